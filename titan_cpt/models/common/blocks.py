"""Parts of a transformer block that several model families have: RMSNorm and the gated MLP."""

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from titan_cpt.models.common.ops import Linear

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, returned in x's dtype.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, features: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize over the last dimension; output of x's shape."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set the scale to 1."""
        nn.init.ones_(self.weight)


class ShardableRMSNorm(RMSNorm):
    """RMSNorm of whose features a tensor-parallel rank may have a part: then the ranks sum their squares.

    A norm over the queries of all heads needs that, since the heads are sharded. The scale is then a DTensor, sharded
    like the features.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize over the last dimension, of which x is this rank's part; output of x's shape."""
        weight = self.weight
        if not isinstance(weight, DTensor):
            return super().forward(x)
        part = x.float()
        squares = DTensor.from_local(part.square().sum(-1, keepdim=True), weight.device_mesh, [Partial()])
        # The gradient of the sum is a sum too: each rank knows the part that its features contribute.
        total = squares.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        normed = part * torch.rsqrt(total / weight.shape[0] + self.eps)
        return (normed * weight.to_local().float()).to(x.dtype)


class GatedMLP(nn.Module):
    """The MLP: down(activation(gate(x)) * up(x)). Source: Shazeer 2020, arXiv:2002.05202.

    Args:
        width: features of the residual stream.
        mlp_width: features inside.
        activation: "silu" (SwiGLU), or "gelu_tanh", GELU with tanh instead of the error function (GeGLU).
    """

    def __init__(self, width: int, mlp_width: int, *, activation: str = "silu") -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        self.gate = Linear(width, mlp_width, bias=False)
        self.up = Linear(width, mlp_width, bias=False)
        self.down = Linear(mlp_width, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """MLP output, out_BLD."""
        out_BLD: Tensor = self.down(self.activation(self.gate(x_BLD)) * self.up(x_BLD))
        return out_BLD
