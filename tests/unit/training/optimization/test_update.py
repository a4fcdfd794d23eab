"""Clipping by the global norm; the guard keeps bad numbers from weights and state, a healthy run is as without it."""

import pytest
import torch
from small_models import NUMBERS, Small, everything, give_gradients, same_bits
from torch import nn

from titan_cpt.training.optimization.adamw import build_adamw
from titan_cpt.training.optimization.update import UpdateGuard, clip_grad_norm


@pytest.mark.parametrize(("max_norm", "expected"), [(1.0, (0.6, 0.8)), (10.0, (3.0, 4.0))])
def test_gradients_are_clipped_together(max_norm, expected):
    """Norms 3 and 4 make 5; scaled down to 1, or unchanged where 5 is allowed."""
    model = Small()
    model.weight.grad, model.bias.grad = torch.zeros(3, 4), torch.zeros(3)
    model.weight.grad[1, 2], model.bias.grad[0] = 3.0, -4.0
    norm = clip_grad_norm(model, max_norm)

    assert norm.shape == ()
    assert norm.item() == 5.0
    assert model.weight.grad[1, 2].item() == pytest.approx(expected[0], rel=1e-5)
    assert model.bias.grad[0].item() == pytest.approx(-expected[1], rel=1e-5)


def step_under_guard(model, optimizer, guard, step, *, loss=1.0, poison=None):
    give_gradients(model, step)
    if poison is not None:
        model.bias.grad[1] = poison
    guard.observe(torch.tensor(loss), clip_grad_norm(model, 1.0))
    optimizer.step()


@pytest.mark.parametrize("fault", [{"loss": float("nan")}, {"loss": float("inf")}, {"poison": float("nan")}])
def test_nothing_moves_from_the_first_bad_step_on_until_the_reset(fault):
    """Weights, moments and step counts keep their bits through the bad step and the good ones after it."""
    model = Small()
    optimizer = build_adamw(model, lr=1e-2, **NUMBERS)
    guard = UpdateGuard(optimizer)
    step_under_guard(model, optimizer, guard, 0)
    before = everything(model, optimizer)
    step_under_guard(model, optimizer, guard, 1, **fault)
    after_bad = everything(model, optimizer)
    step_under_guard(model, optimizer, guard, 2)
    after_good = everything(model, optimizer)
    halted = bool(guard.halted)
    guard.reset()
    step_under_guard(model, optimizer, guard, 3)

    assert halted
    assert same_bits(before, after_bad)
    assert same_bits(before, after_good)
    assert not bool(guard.halted)
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))


@pytest.mark.parametrize("poison", [float("inf"), float("-inf")])
def test_an_infinite_gradient_changes_no_weight_either(poison):
    """Clipping by an infinite norm makes sound gradients 0 and the infinite one NaN; neither reaches a weight."""
    model = Small()
    optimizer = build_adamw(model, lr=1e-2, **NUMBERS)
    guard = UpdateGuard(optimizer)
    before = everything(model, optimizer)
    step_under_guard(model, optimizer, guard, 0, poison=poison)

    assert same_bits(before, everything(model, optimizer))
    assert all(optimizer.state[parameter]["step"].item() == 0 for parameter in model.parameters())


def test_without_the_guard_one_bad_gradient_ruins_every_weight():
    """What the guard is for: clipping spreads a NaN over all gradients."""
    model = Small()
    optimizer = build_adamw(model, lr=1e-2, **NUMBERS)
    give_gradients(model, 0)
    model.bias.grad[1] = float("nan")
    clip_grad_norm(model, 1.0)
    optimizer.step()

    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_a_healthy_run_is_that_of_torchs_adamw_bit_for_bit():
    """Guarded, with the state made beforehand, against a plain torch.optim.AdamW over the same groups: five steps."""
    model, plain_model = Small(), Small()
    optimizer = build_adamw(model, lr=1e-2, **NUMBERS)
    guard = UpdateGuard(optimizer)
    plain = torch.optim.AdamW(
        [{"params": [plain_model.weight]}, {"params": [plain_model.bias], "weight_decay": 0.0}],
        lr=1e-2,
        fused=True,
        **NUMBERS,
    )
    for step in range(5):
        step_under_guard(model, optimizer, guard, step)
        give_gradients(plain_model, step)
        nn.utils.clip_grad_norm_(plain_model.parameters(), 1.0)
        plain.step()

    assert same_bits(everything(model, optimizer), everything(plain_model, plain))
