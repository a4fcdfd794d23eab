"""The weights that a single process multiplies with: cast when those it trains changed, gradients summed in fp32."""

import pytest
import torch
from torch import nn

from titan_cpt.distributed.master_weights import ComputeCopy
from titan_cpt.training.optimizer import build_adamw


def pair():
    """A model that is trained, the bf16 one that runs, and what ties them."""
    trained = nn.Linear(3, 2)
    working = nn.Linear(3, 2).to(torch.bfloat16)
    return trained, working, ComputeCopy(trained, working)


def pass_through(working, copy, x):
    copy.refresh()
    copy.take_gradients()
    working(x).float().sum().backward()
    copy.give_gradients()


def test_the_copy_follows_the_optimizer_and_whatever_else_writes_weights():
    """After a step of the fused optimizer, which raises no version counter, and after a write in place."""
    trained, working, copy = pair()
    optimizer = build_adamw(trained, lr=0.5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    pass_through(working, copy, torch.ones(1, 3, dtype=torch.bfloat16))
    before = trained.weight.detach().clone()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    copy.refresh()

    assert not torch.equal(trained.weight, before)
    assert torch.equal(working.weight, trained.weight.bfloat16())
    with torch.no_grad():
        trained.bias.fill_(1 / 3)
    copy.refresh()

    assert torch.equal(working.bias, trained.bias.bfloat16())


def test_weights_are_cast_once_a_step_however_many_micro_batches(monkeypatch):
    """Three micro-batches, a measurement between steps, three more: two casts."""
    casts, cast = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *tensors: casts.append(cast(*tensors)))
    trained, working, copy = pair()
    x = torch.ones(1, 3, dtype=torch.bfloat16)
    for _ in range(2):
        copy.refresh()
        for _ in range(3):
            pass_through(working, copy, x)
        trained.zero_grad(set_to_none=True)

    assert len(casts) == 2


def test_gradients_of_micro_batches_are_summed_in_fp32():
    """1 and three times 1/512: bf16 would lose every one of the small ones."""
    trained, working, copy = pair()
    for value in (1.0, 2**-9, 2**-9, 2**-9):
        pass_through(working, copy, torch.full((1, 3), value, dtype=torch.bfloat16))

    assert trained.weight.grad.dtype is torch.float32
    assert trained.weight.grad[0, 0].item() == 1 + 3 * 2**-9


def test_two_different_models_are_our_own_mistake():
    """The pairs are made by order, so shapes must agree."""
    with pytest.raises(AssertionError, match="two different models"):
        ComputeCopy(nn.Linear(3, 2), nn.Linear(2, 3))
