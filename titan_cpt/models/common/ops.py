"""Replacements for operations that torch 2.13 computes slowly on some CPUs or cannot compile for them.

Elsewhere these functions call torch's own operation. There are two reasons for replacements:

- On a CPU without bfloat16 instructions torch multiplies bfloat16 matrices element by element, 4 to 50 times slower
  than float32 (scripts/bench/products.py). There, `linear` and `multiply` compute in float32 and round once. Bfloat16
  instructions also accumulate in float32, so the results are the same.
- torch.compile decomposes an operation and makes it slower, or fails to compile it.

Shape letters: B sequences, L positions, S positions of keys, N heads, H head width, R half of its rotated features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CPU_HAS_BFLOAT16: bool = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
"""Whether torch uses bfloat16 instructions on this CPU: x86 with AVX-512 or AMX, newer aarch64."""
_SHORT_ON_CPU = 128 * 64  # largest product of positions and head width that counts as short


class Linear(nn.Linear):
    """torch's linear layer, computed with `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b; the input's last dimension is the number of input features."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x; the last dimensions of x and of the weight are equal."""
    if not multiplied_in_float32(x.dtype, x.device):
        return F.linear(x, weight, bias)
    product: Tensor = _RoundedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of two matrices, written to `out` if given; without autograd."""
    if not multiplied_in_float32(a.dtype, a.device):
        return torch.mm(a, b, out=out)
    product = torch.mm(a.float(), b.float())
    return product.to(a.dtype) if out is None else out.copy_(product)


def attention(q_BNLH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, **how: Any) -> Tensor:
    """torch's scaled dot-product attention with its keyword arguments, out_BNLH in the dtype of the queries.

    On every CPU, training computes attention over short sequences in float32: the backward pass of torch's bfloat16
    kernel has a large fixed cost per call. With heads of 32 features, forward and backward in bfloat16 take 2.5 times
    as long as in float32 at 128 positions, equally long at 512, and less beyond (scripts/bench/attention.py).
    """
    length, width = q_BNLH.shape[-2:]
    on_cpu = q_BNLH.device.type == "cpu" and q_BNLH.dtype == torch.bfloat16
    short = on_cpu and torch.is_grad_enabled() and length * width <= _SHORT_ON_CPU
    if not short and not multiplied_in_float32(q_BNLH.dtype, q_BNLH.device):
        return F.scaled_dot_product_attention(q_BNLH, k_BNSH, v_BNSH, **how)
    out_BNLH = F.scaled_dot_product_attention(q_BNLH.float(), k_BNSH.float(), v_BNSH.float(), **how)
    return out_BNLH.to(q_BNLH.dtype)


def multiplied_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products in this dtype on this device are computed in float32 and rounded."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not CPU_HAS_BFLOAT16


class _RoundedLinear(torch.autograd.Function):
    """`linear` in float32 that saves its operands in bfloat16, so that it saves no more bytes than a bfloat16 layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2).float()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.float()).to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


def cos_sin(angles_LR: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle. Opaque to torch.compile, which would recompute them for every rotated element."""
    if torch.compiler.is_compiling():
        opaque: tuple[Tensor, Tensor] = _cos_sin(angles_LR)
        return opaque
    return angles_LR.cos(), angles_LR.sin()


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, x Phi(x). Opaque to torch.compile on a CPU: its error function takes twice as long as torch's."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        opaque: Tensor = _gelu(x)
        return opaque
    return F.gelu(x)


def copy_for_separate_grad(x: Tensor) -> Tensor:
    """x, or a copy of it when compiled for a CPU in reduced precision, so that its gradient is a separate tensor.

    Works around an Inductor bug: if attention and MLP are added to the same residual stream, the biases of their output
    projections have the same gradient, and the generated C++ declares it twice under one name.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype != torch.float32:
        copied: Tensor = _copy(x)
        return copied
    return x


@torch.library.custom_op("titan_cpt::cos_sin", mutates_args=())
def _cos_sin(angles_LR: Tensor) -> tuple[Tensor, Tensor]:
    return angles_LR.cos(), angles_LR.sin()


@_cos_sin.register_fake
def _(angles_LR: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(angles_LR), torch.empty_like(angles_LR)


@torch.library.custom_op("titan_cpt::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


@torch.library.custom_op("titan_cpt::gelu_backward", mutates_args=())
def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    slope: Tensor = torch.ops.aten.gelu_backward(grad, x)
    return slope


@torch.library.custom_op("titan_cpt::copy", mutates_args=())
def _copy(x: Tensor) -> Tensor:
    return x.clone()


@_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_gelu_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_copy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_gelu.register_autograd(
    lambda ctx, grad: _gelu_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
_copy.register_autograd(lambda _, grad: _copy(grad))
