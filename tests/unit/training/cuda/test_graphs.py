"""A captured step: the losses, norms and weights of eager steps to the last bit, whatever happens in between."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import training
from recorded_graphs import RecordedGraphs

from titan_cpt.training.cuda.graphs import EAGER_STEPS, CapturedStep
from titan_cpt.training.stage_start import begin_stage

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture
def raw(tmp_path):
    """The two-stage config of the tests of training."""
    return training.two_stages(training.write_languages(tmp_path), tmp_path)


@contextmanager
def captured_trainer(raw):
    """A trainer whose steps are captured by the recorder, and the recorder."""
    with training.built_trainer(training.config_of(raw)) as trainer:
        graphs = RecordedGraphs()
        stepper = CapturedStep(trainer.stepper, trainer.runner.copy, graphs)
        yield replace(trainer, stepper=stepper), graphs


def numbers(results):
    """(loss, gradient norm, health) of each step."""
    return [str((r.loss.item(), r.grad_norm.item(), r.health.tolist())) for r in results]  # a NaN equals itself


def weights_of(trainer):
    """Weights and optimizer state, by name."""
    found = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for name, p in trainer.model.named_parameters():
        found |= {f"{name}.{key}": value.clone() for key, value in trainer.optimizer.state[p].items()}
    return found


def trained(trainer, steps=7):
    """Results and weights after some steps of the first stage; a validation after every second one."""
    stage = trainer.plan.stages[0]
    begin_stage(trainer, stage)
    trainer.stepper.restart()
    loader = training.loader_of(trainer, stage)
    found = []
    for step in range(steps):
        found.append(trainer.train_step(loader, stage, step))
        if step % 2:
            found_loss = {name: loss.nats_per_token for name, loss in trainer.validator.measure(trainer.runner).items()}
            found[-1] = replace(found[-1], health=torch.tensor([*found[-1].health, *found_loss.values()]))
    return numbers(found), weights_of(trainer)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("local_batch", [4, 2, 1])
def test_captured_steps_are_eager_steps_to_the_last_bit(raw, precision, local_batch):
    """1, 2 and 4 micro-batches, LRs that change, validation between the steps: losses, norms, weights and moments."""
    raw["training"] |= {"mixed_precision_param": precision, "local_batch_size": local_batch}
    with training.built_trainer(training.config_of(raw)) as trainer:
        eager, weights = trained(trainer)
    with captured_trainer(raw) as (trainer, graphs):
        captured, same = trained(trainer)
    replays = (7 - EAGER_STEPS) * (4 // local_batch + 1)

    assert captured == eager
    assert training.same_bits(weights, same)
    assert len({line.partition(",")[0] for line in captured}) == 7
    assert graphs.events.count("capture") == (2 if local_batch == 4 else 3)
    assert graphs.events.count("replay") == replays
