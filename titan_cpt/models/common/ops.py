"""Replacements for operations that torch 2.13 computes slowly on some CPUs or cannot compile for them.

Elsewhere these functions call torch's own operation. There are three reasons for replacements:

- On a CPU without bfloat16 instructions torch multiplies bfloat16 matrices element by element, 4 to 50 times slower
  than float32 (scripts/bench/products.py). There, `linear` and `multiply` compute in float32 and round once. Bfloat16
  instructions also accumulate in float32, so the results are the same.
- On AMD CPUs torch's BLAS (MKL) multiplies float32 matrices with AVX2, although the CPU may have AVX-512. After
  `use_onednn(True)`, `linear` and `multiply` take oneDNN there, which torch contains too: twice as fast.
- torch.compile decomposes an operation and makes it slower, or fails to compile it.

Shape letters: B sequences, L positions, S positions of keys, N heads, H head width, R half of its rotated features.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CPU_HAS_BFLOAT16: bool = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
"""Whether torch uses bfloat16 instructions on this CPU: x86 with AVX-512 or AMX, newer aarch64."""
_onednn_enabled = False
_SHORT_ON_CPU = 128 * 64  # largest product of positions and head width that counts as short


class Linear(nn.Linear):
    """torch's linear layer, computed with `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b; the input's last dimension is the number of input features."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x; the last dimensions of x and of the weight are equal."""
    if _onednn_multiplies(x, weight):
        product: Tensor = _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return product
    if not multiplied_in_float32(x.dtype, x.device):
        return F.linear(x, weight, bias)
    rounded: Tensor = _RoundedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return rounded


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of two matrices, written to `out` if given; without autograd."""
    if _onednn_multiplies(a, b):
        product = _onednn_product(a, b.t())
    elif multiplied_in_float32(a.dtype, a.device):
        product = torch.mm(a.float(), b.float()).to(a.dtype)
    else:
        return torch.mm(a, b, out=out)
    return product if out is None else out.copy_(product)


def attention(
    q_BNLH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, *, backend: SDPBackend | None = None, **how: Any
) -> Tensor:
    """torch's scaled dot-product attention with its keyword arguments, out_BNLH in the dtype of the queries.

    `backend` is the only kernel to use; None leaves the choice to torch. It is set here, within what torch.compile
    traces: a setting from outside is not part of the key of the compiler's cache, from which a later process with
    another setting would take the kernel of the first one.

    On every CPU, training computes attention over short sequences in float32: the backward pass of torch's bfloat16
    kernel has a large fixed cost per call. With heads of 32 features, forward and backward in bfloat16 take 2.5 times
    as long as in float32 at 128 positions, equally long at 512, and less beyond (scripts/bench/attention.py).
    """
    if backend is not None:
        with sdpa_kernel(backend):
            return attention(q_BNLH, k_BNSH, v_BNSH, **how)
    if not attended_in_float32(q_BNLH, length=q_BNLH.shape[-2], trained=torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q_BNLH, k_BNSH, v_BNSH, **how)
    out_BNLH = F.scaled_dot_product_attention(q_BNLH.float(), k_BNSH.float(), v_BNSH.float(), **how)
    return out_BNLH.to(q_BNLH.dtype)


def attended_in_float32(q_BNLH: Tensor, *, length: int, trained: bool) -> bool:
    """Whether attention of these queries over `length` positions is computed in float32 and rounded; see `attention`.

    Args:
        trained: there will be a backward pass.
    """
    on_cpu = q_BNLH.device.type == "cpu" and q_BNLH.dtype == torch.bfloat16
    short = on_cpu and trained and length * q_BNLH.shape[-1] <= _SHORT_ON_CPU
    return short or multiplied_in_float32(q_BNLH.dtype, q_BNLH.device)


def multiplied_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products in this dtype on this device are computed in float32 and rounded."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not CPU_HAS_BFLOAT16


def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices with wider instructions than MKL: on an AMD CPU with AVX-512."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    has_both = has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not has_both or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False


def use_onednn(enable: bool) -> None:
    """Multiply float32 matrices on this process's CPU with oneDNN from now on, if it is faster, or with MKL again.

    The sums are in another order: both results are within float32's rounding of the exact ones, not equal.
    """
    global _onednn_enabled
    _onednn_enabled = enable and onednn_is_faster()


def _onednn_multiplies(a: Tensor, b: Tensor) -> bool:
    if not _onednn_enabled or torch.compiler.is_compiling():
        return False
    return (
        a.dtype == b.dtype == torch.float32 and a.is_cpu and not isinstance(a, DTensor) and not isinstance(b, DTensor)
    )


def _onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias; both matrices may be transposed views."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product


def _operands_for_backward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the backward pass of a linear layer needs: the input for the weight's gradient, and the reverse."""
    needs_x, needs_weight, _ = ctx.needs_input_grad
    return x if needs_weight else None, weight if needs_x else None


class _OneDNNLinear(torch.autograd.Function):
    """`linear` whose three products are oneDNN's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(*_operands_for_backward(ctx, x, weight))
        return _onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_rows = grad.flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _onednn_product(grad_rows, weight.t()).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            x_rows = x.flatten(0, -2)
            # The result with fewer rows than columns is up to 1.6 times as fast as its transpose.
            if grad_rows.shape[1] > x_rows.shape[1]:
                grad_weight = _onednn_product(x_rows.t(), grad_rows.t()).t()
            else:
                grad_weight = _onednn_product(grad_rows.t(), x_rows.t())
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        return grad_x, grad_weight, grad_bias


class _RoundedLinear(torch.autograd.Function):
    """`linear` in float32 that saves its operands in bfloat16, so that it saves no more bytes than a bfloat16 layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(*_operands_for_backward(ctx, x, weight))
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2).float()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.float()).to(grad.dtype).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.flatten(0, -2).float()).to(grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(grad.dtype)
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
