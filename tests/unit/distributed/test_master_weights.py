"""The bf16 compute copy: cast when the master weights changed, gradients accumulated in fp32."""

import pytest
import torch
from torch import nn

from titan_cpt.distributed.master_weights import ComputeCopy
from titan_cpt.training.optimization.adamw import build_adamw


def pair():
    """The fp32 master model, the bf16 model that computes, and the copy between them."""
    master = nn.Linear(3, 2)
    compute = nn.Linear(3, 2).to(torch.bfloat16)
    return master, compute, ComputeCopy(master, compute)


def pass_through(compute, copy, x):
    copy.refresh()
    copy.take_gradients()
    compute(x).float().sum().backward()
    copy.give_gradients()


def test_the_copy_is_cast_after_any_change_of_the_master_weights():
    """After a step of the fused optimizer, which does not increase version counters, and after an in-place write."""
    master, compute, copy = pair()
    optimizer = build_adamw(master, lr=0.5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    pass_through(compute, copy, torch.ones(1, 3, dtype=torch.bfloat16))
    before = master.weight.detach().clone()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    copy.refresh()

    assert not torch.equal(master.weight, before)
    assert torch.equal(compute.weight, master.weight.bfloat16())
    with torch.no_grad():
        master.bias.fill_(1 / 3)
    copy.refresh()

    assert torch.equal(compute.bias, master.bias.bfloat16())


def test_weights_are_cast_once_a_step_however_many_micro_batches(monkeypatch):
    """Three micro-batches, a measurement between steps, three more: two casts."""
    casts, cast = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *tensors: casts.append(cast(*tensors)))
    master, compute, copy = pair()
    x = torch.ones(1, 3, dtype=torch.bfloat16)
    for _ in range(2):
        copy.refresh()
        for _ in range(3):
            pass_through(compute, copy, x)
        master.zero_grad(set_to_none=True)

    assert len(casts) == 2


def test_gradients_of_micro_batches_are_summed_in_fp32():
    """1 and three times 1/512: bf16 would lose every one of the small ones."""
    master, compute, copy = pair()
    for value in (1.0, 2**-9, 2**-9, 2**-9):
        pass_through(compute, copy, torch.full((1, 3), value, dtype=torch.bfloat16))

    assert master.weight.grad.dtype is torch.float32
    assert master.weight.grad[0, 0].item() == 1 + 3 * 2**-9


def test_an_optimizer_that_writes_the_copy_spares_the_cast_and_reads_bf16_gradients(monkeypatch):
    """Only new master weights are cast; a weight that is named keeps gradients in fp32, as all do with accumulation."""
    casts, cast = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *tensors: casts.append(cast(*tensors)))
    master, compute, copy = pair()
    written = copy.leave_to_optimizer(accumulates=False, float32=(compute.bias,))
    for _ in range(2):
        pass_through(compute, copy, torch.ones(1, 3, dtype=torch.bfloat16))
        dtypes = master.weight.grad.dtype, master.bias.grad.dtype
        master.zero_grad(set_to_none=True)
    with torch.no_grad():
        master.bias.fill_(1 / 3)
    copy.refresh()

    assert dtypes == (torch.bfloat16, torch.float32)
    assert written == {master.weight: compute.weight, master.bias: compute.bias}
    assert len(casts) == 2
    assert torch.equal(compute.bias, master.bias.bfloat16())


def test_accumulated_gradients_stay_in_fp32_when_the_optimizer_writes_the_copy():
    """1 and 1/512: bf16 would lose the small one."""
    master, compute, copy = pair()
    copy.leave_to_optimizer(accumulates=True, float32=())
    for value in (1.0, 2**-9):
        pass_through(compute, copy, torch.full((1, 3), value, dtype=torch.bfloat16))

    assert master.weight.grad[0, 0].item() == 1 + 2**-9


def test_two_different_models_are_refused():
    """The pairs are made by order, so shapes must agree."""
    with pytest.raises(AssertionError, match="two different models"):
        ComputeCopy(nn.Linear(3, 2), nn.Linear(2, 3))


def test_a_step_casts_the_trained_weights_only(monkeypatch):
    """The other one stays as it was cast; a weight that is frozen just after a step is still cast."""
    casts, cast = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: casts.append([len(to), cast(to, of)][0]))
    master, compute, copy = pair()
    for model in (master, compute):
        model.bias.requires_grad_(False)
    optimizer = build_adamw(master, lr=0.5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    pass_through(compute, copy, torch.ones(1, 3, dtype=torch.bfloat16))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for model in (master, compute):
        model.requires_grad_(False)
    copy.refresh()

    assert casts == [2, 1]
    assert torch.equal(compute.weight, master.weight.bfloat16())
    assert compute.bias.grad is None
