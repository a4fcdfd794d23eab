"""Operations that torch.compile is not to look into, because it would make them slower or fail (torch 2.13).

Outside torch.compile each is what its name says and nothing else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def with_gradient_apart(x: Tensor) -> Tensor:
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
