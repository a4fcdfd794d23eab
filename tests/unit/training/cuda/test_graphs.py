"""A captured step: the losses, norms and weights of eager steps to the last bit, whatever happens in between."""

import gc
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import training
from recorded_graphs import RecordedGraphs

from titan_cpt.common.batch_sizes import BatchPhase, BatchSizes
from titan_cpt.common.console import RunConsole
from titan_cpt.common.signals import StopRequest
from titan_cpt.data.batch import Batch
from titan_cpt.distributed.document_backend import set_document_backend
from titan_cpt.distributed.process_group import init_process_group
from titan_cpt.train import Trainer
from titan_cpt.training.build import build
from titan_cpt.training.cuda.graphs import EAGER_STEPS, CapturedStep
from titan_cpt.training.screen.display import Display
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
            losses = trainer.validator.measure(trainer.runner, stage.name)
            found_loss = {name: loss.nats_per_token for name, loss in losses.items()}
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_replay_makes_the_mask_of_its_own_documents(raw, precision):
    """A boolean one; every batch has other documents. test_document_kernels.py replays the mask of FlexAttention."""
    raw["training"] |= {"mixed_precision_param": precision, "document_mask": True, "document_positions": True}
    found = []
    for masked in (True, False):
        raw["training"]["document_mask"] = masked
        with training.built_trainer(training.config_of(raw)) as trainer:
            set_document_backend([trainer.runner.model], "math")
            found.append(trained(trainer))
        with captured_trainer(raw) as (trainer, graphs):
            set_document_backend([trainer.runner.model], "math")
            found.append(trained(trainer))
            assert graphs.events.count("replay") == (7 - EAGER_STEPS) * 3
    (eager, weights), (captured, same), (unmasked, _), _ = found

    assert captured == eager
    assert training.same_bits(weights, same)
    assert unmasked != eager


def ramped(trainer):
    """The trainer with 2 sequences in the first four steps of its first stage, and 4 in each later one."""
    sizes = BatchSizes((BatchPhase(0, 0, 2), BatchPhase(4, 8, 4)))
    first, *others = trainer.plan.stages
    plan = replace(trainer.plan, stages=(replace(first, batch_sizes=sizes), *others))
    return replace(trainer, plan=plan, display=Display(plan, RunConsole(shown=False), steps_done=0))


def test_a_batch_size_ramp_captures_its_steps_anew(raw):
    """1 / tokens of the step is a constant of the capture: after four steps of 2 micro-batches come steps of 4."""
    raw["training"] |= {"local_batch_size": 1}
    with training.built_trainer(training.config_of(raw)) as trainer:
        eager, weights = trained(ramped(trainer), steps=8)
    with captured_trainer(raw) as (trainer, graphs):
        captured, same = trained(ramped(trainer), steps=8)

    assert captured == eager
    assert training.same_bits(weights, same)
    assert graphs.events.count("capture") == 2 * 3
    assert graphs.events.count("replay") == 2 * (2 + 1) + 2 * (4 + 1)


FACTOR = torch.ones(())  # multiplies every loss; a replay reads it, as it would read bad weights or tokens


class FaultyTrainer(Trainer):
    """Multiplies the losses of some steps by a bad number, and gets a signal to stop before others."""

    bad: ClassVar[dict] = {}
    stops: ClassVar[set] = set()

    def train_step(self, loader, stage, step):
        """A step of the program."""
        FACTOR.fill_(self.bad.get((stage.name, step), 1.0))
        if (stage.name, step) in self.stops:
            self.stops.remove((stage.name, step))
            self.stop.name = "SIGTERM"
        return super().train_step(loader, stage, step)


def session(raw, name, *, captured, bad=(), stops=()):
    """Train until the end or a stop, in this process; the run's folder and the recorder's events."""
    raw = training.changed(raw, job={"name": name})
    folder = Path(raw["job"]["output_dir"]) / name
    folder.mkdir(exist_ok=True)
    FaultyTrainer.bad, FaultyTrainer.stops = dict(bad), set(stops)
    graphs = RecordedGraphs()
    with StopRequest() as stop:
        trainer, checkpoint = build(FaultyTrainer, training.config_of(raw), init_process_group(), folder, stop)
        trainer.runner.model.register_forward_hook(lambda _module, _inputs, loss: loss * FACTOR)
        if captured:
            trainer = replace(trainer, stepper=CapturedStep(trainer.stepper, trainer.runner.copy, graphs))
        try:
            trainer.train(checkpoint)
        finally:
            trainer.checkpoints.wait()
            trainer.log.close()
            gc.enable()
    return folder, graphs.events


def same_run(first, second):
    """All numbers of two runs, and the weights and moments of all their checkpoints, to the last bit."""
    assert training.numbers_of(first) == training.numbers_of(second)
    assert training.checkpoints_of(first) == training.checkpoints_of(second)
    for name in training.checkpoints_of(first):
        for part in ("model", "optimizer"):
            assert training.same_bits(training.tensors_of(first / name, part), training.tensors_of(second / name, part))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_of_two_stages_with_bad_steps_is_the_same_run(raw, precision):
    """A stage that keeps the optimizer, with other hyperparameters; a NaN and a spike, found steps later; two stops."""
    raw["training"] |= {"mixed_precision_param": precision, "on_nonfinite": "skip"}
    raw["training"] |= {"on_loss_spike": "skip", "loss_spike_window": 3, "loss_spike_z_score": 20.0}
    raw["stages"][1]["optimizer"] = {"beta2": 0.9, "weight_decay": 0.3}
    raw["metrics"]["log_freq"] = 3
    bad = {("english", 6): float("nan"), ("german", 5): 50.0}
    eager, _ = session(raw, "eager", captured=False, bad=bad)
    captured, first = session(raw, "captured", captured=True, bad=bad, stops={("english", 8), ("german", 7)})
    _, second = session(raw, "captured", captured=True, bad=bad, stops={("german", 7)})
    _, third = session(raw, "captured", captured=True, bad=bad)

    same_run(eager, captured)
    assert [e["step"] for e in training.events_of(captured, "skip_batch")] == [7, 6]
    assert all("replay" in events for events in (first, second))
    assert "run" in third


def test_a_rolled_back_run_is_the_same_run(raw):
    """Weights and optimizer are loaded again, which gives the optimizer's state other addresses."""
    raw["training"] |= {"on_nonfinite": "rollback", "local_batch_size": 4}
    raw["metrics"]["log_freq"] = 2
    raw["checkpoint"]["interval"] = 3
    bad = {("english", 8): float("inf"), ("german", 1): float("nan")}
    eager, _ = session(raw, "eager", captured=False, bad=bad)
    captured, events = session(raw, "captured", captured=True, bad=bad)

    same_run(eager, captured)
    assert [e["step"] for e in training.events_of(captured, "skip_batch")] == [9, 2]
    assert events.count("release") == 4


def test_a_capture_must_not_wait_for_the_device(raw):
    """The recorder, which stands for a GPU, refuses an operation that copies a number to the host."""
    with captured_trainer(raw) as (trainer, _):
        norm = trainer.guard.observe
        trainer.guard.observe = lambda loss, grad_norm: norm(loss, grad_norm) * float(loss)
        with pytest.raises(AssertionError, match="waits for the device"):
            trained(trainer)


def test_another_batch_shape_needs_a_restart(raw):
    """It would be broadcast into the captured tensor."""
    with captured_trainer(raw) as (trainer, _):
        stage = trainer.plan.stages[0]
        begin_stage(trainer, stage)
        batch = training.loader_of(trainer, stage).batch(0, 0)
        shorter = Batch(batch.inputs_BL[:1], batch.targets_BL[:1])
        tokens = stage.step_tokens(0)
        trainer.stepper.backward(batch, step_tokens=tokens, first=True)
        with pytest.raises(AssertionError, match="one batch shape"):
            trainer.stepper.backward(shorter, step_tokens=tokens, first=False)
        trainer.stepper.restart()
        trainer.stepper.backward(shorter, step_tokens=tokens, first=True)
