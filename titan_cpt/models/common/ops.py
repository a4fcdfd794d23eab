"""Operations that torch (2.13) does slowly on some CPU, or cannot compile for one, and how they are done instead.

Anywhere else each is torch's own. Two reasons:

- A CPU without instructions for bfloat16 multiplies such matrices element by element, at a quarter to a fiftieth of the
  speed of float32 (scripts/bench/products.py). There products are made in float32 and rounded once, which is what the
  instructions do: they too add up in float32.
- torch.compile looks into an operation and makes it slower, or fails.

Shape letters: B sequences, L positions, S positions of keys, N heads, H head width, R half of its rotated features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CPU_HAS_BFLOAT16: bool = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
"""Whether this CPU multiplies in bfloat16, as torch itself decides it: x86 with AVX-512 or AMX, newer Arm."""
_SHORT_ON_CPU = 128 * 64  # positions x features of a head


class Linear(nn.Linear):
    """torch's linear layer; its product is `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Of any shape that ends in the layer's inputs."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, in the dtype of x, which is of any shape that ends in the weight's last dimension."""
    if not multiplied_in_float32(x.dtype, x.device):
        return F.linear(x, weight, bias)
    product: Tensor = _RoundedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of two matrices, put into `out` if that is given; it has no gradient."""
    if not multiplied_in_float32(a.dtype, a.device):
        return torch.mm(a, b, out=out)
    product = torch.mm(a.float(), b.float())
    return product.to(a.dtype) if out is None else out.copy_(product)


def attention(q_BNLH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, **how: Any) -> Tensor:
    """torch's scaled dot-product attention, with its keyword arguments, out_BNLH in the dtype of the queries.

    On a CPU that has bfloat16 too short sequences are trained in float32: the backward pass of torch's bfloat16 kernel
    costs much a block however small, 2.5 times the float32 kernel's time, forward and backward, at 128 positions of 32
    features, as much at 512, and less beyond (scripts/bench/attention.py).
    """
    length, width = q_BNLH.shape[-2:]
    on_cpu = q_BNLH.device.type == "cpu" and q_BNLH.dtype == torch.bfloat16
    short = on_cpu and torch.is_grad_enabled() and length * width <= _SHORT_ON_CPU
    if not short and not multiplied_in_float32(q_BNLH.dtype, q_BNLH.device):
        return F.scaled_dot_product_attention(q_BNLH, k_BNSH, v_BNSH, **how)
    out_BNLH = F.scaled_dot_product_attention(q_BNLH.float(), k_BNSH.float(), v_BNSH.float(), **how)
    return out_BNLH.to(q_BNLH.dtype)


def multiplied_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this dtype are made in float32 and rounded."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not CPU_HAS_BFLOAT16


class _RoundedLinear(torch.autograd.Function):
    """Keeps its operands as they came, so that it needs no more memory than a layer in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, grad_x, grad_weight, grad_bias = grad.flatten(0, -2).float(), None, None, None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.float()).to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


def cos_sin(angles_LR: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle; compiled, they would be worked out again for every element that is rotated."""
    if torch.compiler.is_compiling():
        opaque: tuple[Tensor, Tensor] = _cos_sin(angles_LR)
        return opaque
    return angles_LR.cos(), angles_LR.sin()


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, x Phi(x); compiled for a CPU, its error function takes twice the time of the library's."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        opaque: Tensor = _gelu(x)
        return opaque
    return F.gelu(x)


def copy_for_separate_grad(x: Tensor) -> Tensor:
    """The same numbers; compiled for a CPU in bf16, a copy, whose gradient is a tensor of its own.

    Where attention and MLP are added to one stream, their last biases have one and the same gradient, and Inductor's
    C++ stores it twice under one name. With a copy between them a block compiles whole.
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
