"""Operations that the compiler does not look into, and attention that is worked out in float32 where that is faster."""

import pytest
import torch
import torch.nn.functional as F

from titan_cpt.models import opaque
from titan_cpt.models.layers import RotaryCausalAttention

ANGLES = torch.linspace(-4, 4, 24).reshape(4, 6)


@pytest.mark.parametrize("operation", [opaque._cos_sin, opaque._gelu, opaque._copy], ids=["cos_sin", "gelu", "copy"])
def test_the_compiler_is_told_the_truth_about_an_operation(operation):
    """Schema, shapes of what is not computed, and gradients under tracing are those of the operation itself."""
    told = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    differentiable = operation is not opaque._cos_sin
    found = torch.library.opcheck(operation, (ANGLES.clone().requires_grad_(differentiable),), test_utils=told)

    assert set(found.values()) == {"SUCCESS"}


def test_an_opaque_gelu_has_the_gradient_of_gelu():
    """x Phi(x), and by the product rule Phi(x) + x phi(x)."""
    x = ANGLES.double().requires_grad_()
    y = opaque._gelu(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    normal = torch.distributions.Normal(0.0, 1.0)

    torch.testing.assert_close(y, x * normal.cdf(x))
    torch.testing.assert_close(slope, normal.cdf(x) + x * normal.log_prob(x).exp())


def bf16_heads(positions):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, positions, 32, generator=generator).bfloat16().requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(("positions", "upcast"), [(128, True), (1024, False)])
def test_short_attention_is_trained_in_float32_and_gives_bfloat16(positions, upcast):
    """Up to 8,192 positions x features of a head; longer sequences take the bf16 kernel."""
    q_BNLH, k_BNLH, v_BNLH = bf16_heads(positions)
    attention = RotaryCausalAttention(rotary_width=8, rope_base=10_000.0)
    in_fp32 = F.scaled_dot_product_attention(q_BNLH.float(), k_BNLH.float(), v_BNLH.float(), is_causal=True)
    as_it_comes = F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH, is_causal=True)
    trained = attention.attend(q_BNLH, k_BNLH, v_BNLH)

    assert trained.dtype == torch.bfloat16
    assert torch.equal(trained, in_fp32.bfloat16() if upcast else as_it_comes)
    with torch.no_grad():
        assert torch.equal(attention.attend(q_BNLH, k_BNLH, v_BNLH), as_it_comes)


def test_short_attention_is_as_exact_as_bfloat16_can_hold():
    """Its gradients lie no further from exact ones than rounding the exact ones does, by half as much again."""
    heads = bf16_heads(128)
    exact_heads = [x.detach().double().requires_grad_() for x in heads]
    grads = torch.autograd.grad(RotaryCausalAttention(rotary_width=8, rope_base=10_000.0).attend(*heads).sum(), heads)
    exact = torch.autograd.grad(F.scaled_dot_product_attention(*exact_heads, is_causal=True).sum(), exact_heads)

    for grad, right in zip(grads, exact, strict=True):
        rounding = (right.bfloat16().double() - right).norm()
        assert (grad.double() - right).norm() <= 1.5 * rounding + 1e-6 * right.norm()
