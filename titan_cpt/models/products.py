"""Matrix products and attention in bfloat16, also on a CPU that has no instructions for them.

There torch multiplies bfloat16 matrices element by element, at a tenth to a hundredth of the speed of float32
(scripts/bench/products.py). What is here then multiplies in float32 and rounds the result once, which is what the
instructions do: they too add up in float32. Anywhere else, and in any other precision, it is torch's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CPU_HAS_BFLOAT16: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether torch has fast products in bfloat16 on this CPU: x86 with AVX-512 or AMX, and newer Arm."""


class Linear(nn.Linear):
    """torch's linear layer, its products as above."""

    def forward(self, input: Tensor) -> Tensor:
        """`linear` of the input, the weight and the bias."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, in the dtype of x; x of any shape that ends in the weight's last dimension."""
    if not needs_float32(x):
        return F.linear(x, weight, bias)
    product: Tensor = _RoundedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of two matrices, without gradients; where `out` is given, put there."""
    if not needs_float32(a):
        return torch.mm(a, b, out=out)
    product = torch.mm(a.float(), b.float())
    return product.to(a.dtype) if out is None else out.copy_(product)


def attention(q_BNLH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, **how: Any) -> Tensor:
    """torch's scaled dot-product attention with its keyword arguments, in the dtype of the queries."""
    if not needs_float32(q_BNLH):
        return F.scaled_dot_product_attention(q_BNLH, k_BNSH, v_BNSH, **how)
    out_BNLH = F.scaled_dot_product_attention(q_BNLH.float(), k_BNSH.float(), v_BNSH.float(), **how)
    return out_BNLH.to(q_BNLH.dtype)


def needs_float32(x: Tensor) -> bool:
    """Whether products of this tensor are made in float32 and rounded."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not CPU_HAS_BFLOAT16


class _RoundedLinear(torch.autograd.Function):
    """Keeps its operands as they came, so that it takes no more memory than a layer in bfloat16 does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
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
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias
