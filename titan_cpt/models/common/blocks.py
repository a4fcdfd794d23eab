"""Parts of a transformer block that several model families have: RMSNorm and the gated MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_cpt.models.common.ops import Linear


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


class GatedMLP(nn.Module):
    """The MLP, SwiGLU: down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate = Linear(width, mlp_width, bias=False)
        self.up = Linear(width, mlp_width, bias=False)
        self.down = Linear(mlp_width, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """MLP output, out_BLD."""
        out_BLD: Tensor = self.down(F.silu(self.gate(x_BLD)) * self.up(x_BLD))
        return out_BLD
