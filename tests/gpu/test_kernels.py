"""The kernels of a step on a GPU against references in higher precision, or torch's own."""

import pytest
import torch
import torch.nn.functional as F

from titan_cpt.training.loss import _softmax, fused_linear_cross_entropy
from titan_cpt.training.optimization.adamw import parameter_groups, reset_state

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

TOKENS, WIDTH = (4, 300), 64


def relative_error(found, exact):
    """The norm of the difference over the norm, in float64 on the CPU; NaN if there is one."""
    exact = exact.double().cpu()
    return float((found.double().cpu() - exact).norm() / exact.norm())


@pytest.mark.parametrize("vocabulary", [1000, 50_304])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_fused_head_is_that_of_float64(cuda_device, dtype, allowed, compiled, vocabulary):
    """Loss and both gradients, with logits in one chunk and in several; random weights and targets."""
    generator = torch.Generator().manual_seed(vocabulary)
    x_BLD = torch.randn(*TOKENS, WIDTH, generator=generator).to(dtype)
    weight_VD = (torch.randn(vocabulary, WIDTH, generator=generator) / WIDTH**0.5).to(dtype)
    targets_BL = torch.randint(0, vocabulary, TOKENS, generator=generator)
    exact = [tensor.double().requires_grad_() for tensor in (x_BLD, weight_VD)]
    logits_TV = F.linear(*exact).flatten(0, 1)
    expected = F.cross_entropy(logits_TV, targets_BL.flatten(), reduction="sum") / 1200
    expected.backward()
    given = [tensor.to(cuda_device).requires_grad_() for tensor in (x_BLD, weight_VD)]
    total = fused_linear_cross_entropy(*given, targets_BL=targets_BL.to(cuda_device), scale=1 / 1200, compiled=compiled)
    total.backward()

    assert relative_error(total.detach(), expected.detach()) < (1e-6 if dtype is torch.float32 else 1e-3)
    for tensor, reference in zip(given, exact, strict=True):
        assert relative_error(tensor.grad, reference.grad) < allowed


def test_the_gradient_of_the_logits_has_the_same_bits_under_deterministic_algorithms(cuda_device):
    """Where another operation subtracts the targets' part: scatter_add_ cannot be captured there."""
    logits_CV = torch.randn(600, 50_304, device=cuda_device).bfloat16()
    targets_C = torch.randint(0, 50_304, (600,), device=cuda_device)
    losses, gradients = [], []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            loss_C, grad_CV = _softmax(logits_CV.clone(), targets_C, 1 / 1200)
        finally:
            torch.use_deterministic_algorithms(False)
        losses.append(loss_C)
        gradients.append(grad_CV)

    assert torch.equal(*losses)
    assert torch.equal(*gradients)


def small_model(device):
    """Matrices and vectors of sizes that no block divides, with the same values every time."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(513, 257), (1, 7), (65,), (1,), (50_304, 64)]
    values = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return torch.nn.ParameterList([torch.nn.Parameter(value) for value in values])


def test_adamw_in_triton_is_torchs(cuda_device):
    """Ten steps with random gradients; weights and moments agree to float32's rounding, and the step counts exactly."""
    adamw = pytest.importorskip("titan_cpt.training.cuda.adamw")
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    models = [small_model(cuda_device) for _ in range(2)]
    theirs = torch.optim.AdamW(parameter_groups(models[0], 0.1), fused=True, **settings)
    ours = adamw.TritonAdamW(parameter_groups(models[1], 0.1), **settings)
    for optimizer in (theirs, ours):
        reset_state(optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        for first, second in zip(*models, strict=True):
            first.grad = torch.randn(first.shape, generator=generator).to(cuda_device)
            second.grad = first.grad.clone()
        theirs.step()
        ours.step()

    for first, second in zip(*models, strict=True):
        torch.testing.assert_close(second.detach(), first.detach(), rtol=1e-5, atol=1e-7)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[second][name], theirs.state[first][name], rtol=1e-5, atol=1e-9)
        assert ours.state[second]["step"] == theirs.state[first]["step"] == 10


def test_adamw_in_triton_changes_nothing_after_a_bad_step(cuda_device):
    """Weights, moments and step counts, with gradients that are NaN."""
    adamw = pytest.importorskip("titan_cpt.training.cuda.adamw")
    model = small_model(cuda_device)
    before = [parameter.detach().clone() for parameter in model]
    optimizer = adamw.TritonAdamW(parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    reset_state(optimizer)
    for parameter in model:
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones((), device=cuda_device)
    optimizer.step()

    for parameter, value in zip(model, before, strict=True):
        assert torch.equal(parameter, value)
        assert not any(float(state.abs().sum()) for state in optimizer.state[parameter].values())


def test_adamw_in_triton_rounds_the_compute_copy_as_torch_does(cuda_device):
    """After three steps with bf16 gradients; the same gradients in float32 give the same weights, to the last bit."""
    adamw = pytest.importorskip("titan_cpt.training.cuda.adamw")
    weights = []
    for dtype in (torch.bfloat16, torch.float32):
        model = small_model(cuda_device)
        copies = {parameter: torch.empty_like(parameter, dtype=torch.bfloat16) for parameter in model}
        groups = parameter_groups(model, 0.1)
        optimizer = adamw.TritonAdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, copies=copies)
        reset_state(optimizer)
        optimizer.clip_factor.fill_(0.3)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for parameter in model:
                gradient = torch.randn(parameter.shape, generator=generator).to(cuda_device).bfloat16()
                parameter.grad_dtype = dtype
                parameter.grad = gradient.to(dtype)
            optimizer.step()
            optimizer.zero_grad()
        for parameter, copy in copies.items():
            assert torch.equal(copy, parameter.detach().bfloat16())
        weights.append([parameter.detach() for parameter in model])

    assert all(torch.equal(first, second) for first, second in zip(*weights, strict=True))
