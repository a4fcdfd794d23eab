"""AdamW as one Triton launch against torch's fused AdamW, run on the CPU by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import interpreted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from titan_cpt.checkpoint.state_dict import state_to_save
from titan_cpt.training.optimization.adamw import build_adamw, reset_state, set_hyperparameters
from titan_cpt.training.optimization.update import UpdateGuard, clip_grad_norm

pytestmark = interpreted.NEEDS_TRITON
NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((3, 4), (5,), (1,), (1, 1), (513, 2), (512,), (20_000,), (8192, 2))


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    with interpreted.interpreted("titan_cpt.training.cuda.adamw_kernel"):
        yield


def model_of(shapes):
    """A module with parameters of these shapes; the same weights at every call."""
    generator = torch.Generator().manual_seed(1)
    return nn.ParameterList([torch.randn(shape, generator=generator) for shape in shapes])


def gradients_of(model, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(parameter.shape, generator=generator).to(dtype) for parameter in model]


def give(model, gradients):
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad_dtype = gradient.dtype
        parameter.grad = gradient


def everything(model, optimizer):
    """Weights, moments and step counts, copied."""
    tensors = [parameter.detach() for parameter in model]
    return [t.clone() for t in [*tensors, *(v for p in model for v in optimizer.state[p].values())]]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_close(model, optimizer, expected_model, expected):
    """Weights within 4e-6 of an update of size lr and one rounding, moments within a few roundings of a gradient."""
    lr = optimizer.param_groups[0]["lr"]
    for ours, theirs in zip(model, expected_model, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-7, atol=lr * 1e-5)
        ours_state, state = optimizer.state[ours], expected.state[theirs]
        assert ours_state["step"].item() == state["step"].item()
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours_state[name], state[name], rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    betas=st.tuples(st.sampled_from((0.0, 0.8, 0.9)), st.sampled_from((0.0, 0.95, 0.999))),
    lr=st.sampled_from((0.0, 1e-4, 0.3)),
    weight_decay=st.sampled_from((0.0, 0.1)),
    factor=st.sampled_from((1.0, 0.25)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_three_steps_are_those_of_torchs_fused_adamw(shapes, betas, lr, weight_decay, factor, dtype):
    """Ends of tensors, single elements, several chunks; torch gets the gradients clipped and in float32."""
    numbers = {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay}
    model, expected_model = model_of(shapes), model_of(shapes)
    optimizer, expected = build_adamw(model, triton=True, **numbers), build_adamw(expected_model, **numbers)
    optimizer.clip_factor.fill_(factor)
    for step in range(3):
        gradients = gradients_of(model, step, dtype)
        give(model, gradients)
        give(expected_model, [gradient.float() * factor for gradient in gradients])
        optimizer.step()
        expected.step()

    assert_close(model, optimizer, expected_model, expected)


def test_the_first_update_is_lr_times_the_sign_to_the_last_bit_whatever_beta2_is():
    """1 - 0.999 in float32 would be wrong by 2e-5: the bias corrections are computed in float64."""
    model = nn.ParameterList([torch.zeros(4)])
    numbers = {**NUMBERS, "lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-30}
    optimizer = build_adamw(model, triton=True, **numbers)
    give(model, [torch.tensor([1.0, -1.0, 1.0, -1.0])])
    optimizer.step()

    torch.testing.assert_close(model[0].detach(), torch.tensor([-0.5, 0.5, -0.5, 0.5]), rtol=2e-7, atol=0)


def test_the_compute_copy_is_the_updated_weight():
    """Within one unit in the last place of bfloat16: the interpreter cuts off where a GPU rounds."""
    model = model_of(SHAPES)
    copies = {parameter: torch.full_like(parameter, torch.nan, dtype=torch.bfloat16) for parameter in model}
    optimizer = build_adamw(model, triton=True, copies=copies, **NUMBERS)
    give(model, gradients_of(model, 0))
    optimizer.step()

    for parameter, copy in copies.items():
        torch.testing.assert_close(copy.float(), parameter.detach(), rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_nothing_moves_from_the_first_bad_step_on_until_the_reset(fault):
    """NaN gradients in the bad step, sound ones after it: weights, copies, moments and counts keep their bits."""
    model = model_of(SHAPES)
    copies = {parameter: torch.zeros_like(parameter, dtype=torch.bfloat16) for parameter in model}
    optimizer = build_adamw(model, triton=True, copies=copies, **NUMBERS)
    guard = UpdateGuard(optimizer)

    def step(number, bad=False):
        give(model, gradients_of(model, number, torch.bfloat16))
        if bad and fault == "gradient":
            model[5].grad[3] = torch.nan
        loss = torch.tensor(torch.nan if bad and fault == "loss" else 1.0)
        guard.observe(loss, clip_grad_norm(model, 1.0, optimizer=optimizer))
        optimizer.step()

    step(0)
    before = [*everything(model, optimizer), *(copy.clone() for copy in copies.values())]
    step(1, bad=True)
    step(2)
    after = [*everything(model, optimizer), *(copy.clone() for copy in copies.values())]
    guard.reset()
    step(3)

    assert same_bits(before, after)
    moved = everything(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before[: len(moved)], moved, strict=True))


def test_the_clip_factor_is_applied_in_the_step_and_the_gradients_stay():
    """bf16 gradients of norm 5, clipped to 1; the norm is the float32 norm of the bf16 values."""
    model = nn.ParameterList([torch.zeros(2, 3), torch.zeros(3)])
    optimizer = build_adamw(model, triton=True, **NUMBERS)
    gradients = [torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)]
    gradients[0][1, 2], gradients[1][0] = 3.0, -4.0
    give(model, gradients)
    norm = clip_grad_norm(model, 1.0, optimizer=optimizer)
    optimizer.step()

    assert (norm.item(), norm.dtype) == (5.0, torch.float32)
    assert [gradient.abs().max().item() for gradient in gradients] == [3.0, 4.0]
    assert optimizer.state[model[0]]["exp_avg"][1, 2].item() == pytest.approx(0.1 * 0.6, rel=1e-5)
    assert optimizer.state[model[1]]["exp_avg"][0].item() == pytest.approx(-0.1 * 0.8, rel=1e-5)


def test_the_norm_of_mixed_gradients_is_not_rounded_to_bfloat16():
    """sqrt(300^2 + 1 + 1): torch's get_total_norm would round the bf16 part to 300."""
    model = nn.ParameterList([torch.zeros(2), torch.zeros(1)])
    give(model, [torch.tensor([300.0, 17.0], dtype=torch.bfloat16), torch.tensor([1.0])])
    optimizer = build_adamw(model, triton=True, **NUMBERS)

    assert clip_grad_norm(model, 1.0, optimizer=optimizer).item() == pytest.approx(
        (300**2 + 17**2 + 1) ** 0.5, rel=1e-6
    )


def test_gradients_at_any_address_give_the_same_bits():
    """FSDP2's gradients are views of one buffer: at an address that no 16-byte access can use."""
    results = []
    for shift in (0, 1):
        model = model_of(SHAPES)
        optimizer = build_adamw(model, triton=True, **NUMBERS)
        gradients = gradients_of(model, 0)
        buffer = torch.zeros(sum(gradient.numel() for gradient in gradients) + shift)
        offset, views = shift, []
        for gradient in gradients:
            view = buffer[offset : offset + gradient.numel()].view(gradient.shape)
            views.append(view.copy_(gradient) if shift else gradient)
            offset += gradient.numel()
        give(model, views)
        optimizer.step()
        results.append(everything(model, optimizer))

    assert same_bits(*results)


def test_a_parameter_without_gradient_does_not_change():
    """As torch does: neither weight nor step count changes."""
    model = model_of(((3, 4), (5,)))
    optimizer = build_adamw(model, triton=True, **NUMBERS)
    model[0].grad = gradients_of(model, 0)[0]
    before = everything(model, optimizer)
    optimizer.step()
    after = everything(model, optimizer)

    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, *[False] * 3, *[True] * 3]


def test_new_hyperparameters_loaded_states_and_resets_take_effect():
    """Against torch's optimizer through the same calls, which replace or zero the state between steps."""
    model, expected_model = model_of(SHAPES), model_of(SHAPES)
    pairs = [
        (model, build_adamw(model, triton=True, **NUMBERS)),
        (expected_model, build_adamw(expected_model, **NUMBERS)),
    ]
    for each_model, each in pairs:
        give(each_model, gradients_of(each_model, 0))
        each.step()
        each.load_state_dict(each.state_dict())
        set_hyperparameters(each, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.3)
        give(each_model, gradients_of(each_model, 1))
        each.step()
        reset_state(each)
        give(each_model, gradients_of(each_model, 2))
        each.step()

    assert_close(*pairs[0], *pairs[1])
    assert pairs[0][1].state[model[0]]["step"].item() == 1


def test_checkpoints_hold_the_same_tensors_under_either_implementation():
    """Names, shapes and dtypes; hyperparameters and the clip factor are not among them."""
    layouts = []
    for triton in (False, True):
        model = nn.Linear(3, 2)
        state = state_to_save(model, build_adamw(model, triton=triton, **NUMBERS))["optimizer"]
        layouts.append({name: (tuple(value.shape), value.dtype) for name, value in state.items()})

    assert layouts[0] == layouts[1]
    assert len(layouts[0]) == 6


def test_shards_of_two_ranks_get_the_update_of_one_process():
    """FSDP2 on two gloo ranks, with uneven and empty shards and unaligned gradients, against one process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    here = Path(__file__).parent
    done = subprocess.run(
        [*torchrun, str(here / "sharded_adamw.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal to one process") == 2
