"""The moments after a warm-up at LR 0 are those of plain torch, and no weight has changed by a bit."""

import signal

import pytest
import torch
import torch.nn.functional as F
import training

from titan_cpt.models.gpt_neox.model import GPTNeoX
from titan_cpt.training.optimization.warm_up import warm_up
from titan_cpt.training.stage_start import begin_stage

pytestmark = training.THEIR_WARNINGS_IGNORED
BETAS = (0.9, 0.95)
TINY = 1e-42  # not a normal float32


@pytest.fixture
def raw(tmp_path):
    """Two small stages, of which the first warms up its optimizer state over six steps."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["stages"][0]["optimizer_state"] = "warm:6"
    return raw


def bits(model):
    """All weights as integers: 0.0 and -0.0 are two of them."""
    return [weight.detach().view(torch.int32).clone() for weight in model.parameters()]


def warmed_up(trainer):
    """Begin the first stage, give it weights that an update by 0 could change, and warm up."""
    stage = trainer.plan.stages[0]
    begun = begin_stage(trainer, stage)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.view(-1)[:3] = torch.tensor([-0.0, 0.0, TINY])
    before = bits(trainer.model)
    done = warm_up(trainer, stage, begun, trainer.train_step)
    return stage, before, (begun, done)


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_warm_up_changes_no_bit_of_a_weight_and_advances_the_state(raw, precision, optimizer):
    """Negative zeros and denormal numbers too, with weight decay and gradients that are clipped."""
    raw["training"]["mixed_precision_param"] = precision
    raw["optimizer"] = {"name": optimizer, "weight_decay": 0.3}
    with training.built_trainer(training.config_of(raw)) as trainer:
        _, before, begun = warmed_up(trainer)

        assert begun == (-6, (0, True))
        assert all(torch.equal(*pair) for pair in zip(before, bits(trainer.model), strict=True))
        states = trainer.optimizer.state.values()
        assert {state["step"].item() for state in states if "step" in state} == {6.0}
        assert all(value.any() for state in states for value in state.values())
        assert trainer.guard.recent_losses() == []


def test_the_moments_are_those_of_plain_torch_on_the_batches_of_the_first_steps(raw):
    """m <- 0.9 m + 0.1 g and v <- 0.95 v + 0.05 g^2, with the clipped gradients of the unchanged weights."""
    with training.built_trainer(training.config_of(raw)) as trainer:
        stage, *_ = warmed_up(trainer)
        model = GPTNeoX(trainer.plan.spec)
        model.load_state_dict(trainer.model.state_dict())
        moments = {name: [torch.zeros_like(weight)] * 2 for name, weight in model.named_parameters()}
        for step in range(6):
            tokens = torch.from_numpy(trainer.readers[stage.name].read(trainer.plan.batch(stage, step)).tokens)
            model.zero_grad()
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for name, weight in model.named_parameters():
                first, second = moments[name]
                gradient = weight.grad
                moments[name] = [
                    BETAS[0] * first + (1 - BETAS[0]) * gradient,
                    BETAS[1] * second + (1 - BETAS[1]) * gradient**2,
                ]
        for name, weight in trainer.model.named_parameters():
            state = trainer.optimizer.state[weight]
            torch.testing.assert_close(state["exp_avg"], moments[name][0], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(state["exp_avg_sq"], moments[name][1], rtol=1e-4, atol=1e-9)


def test_a_warm_up_that_a_signal_ends_is_not_complete(raw):
    """SIGTERM at the second pass; the loop then saves nothing."""
    with training.built_trainer(training.config_of(raw)) as trainer:
        stage, calls = trainer.plan.stages[0], []

        def signalled(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGTERM)
            return trainer.train_step(*arguments)

        assert warm_up(trainer, stage, begin_stage(trainer, stage), signalled) == (0, False)
        assert len(calls) == 2


def test_a_stage_without_a_warm_up_begins_at_once(raw):
    """So does a stage that is resumed."""
    with training.built_trainer(training.config_of(raw)) as trainer:
        assert warm_up(trainer, trainer.plan.stages[1], 0, trainer.train_step) == (0, True)
        assert warm_up(trainer, trainer.plan.stages[0], 4, trainer.train_step) == (4, True)
        assert not trainer.optimizer.state[next(trainer.model.parameters())]["step"].item()
