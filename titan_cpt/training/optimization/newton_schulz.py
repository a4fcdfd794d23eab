"""Muon's orthogonalization of a matrix: Newton-Schulz iterations in bfloat16, as torch.optim.Muon computes them."""

import math
from typing import Literal

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial. Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/."""
SMALLEST_NORM = 1e-7
"""A matrix with a smaller Frobenius norm is divided by this one."""
_TO_FINITE_NORM = 2.0**-80  # brings a matrix of up to 2^32 finite elements to a norm that float32 holds

AdjustLR = Literal["match_rms_adamw", "original"]


def orthogonalize(matrix_MN: Tensor, steps: int) -> Tensor:
    """The matrix with its singular values moved near 1, in bfloat16; overwrites its argument.

        X <- M / |M|
        X <- a X + (b A + c A A) X,  A = X X^T                  `steps` times, on M^T where M has more rows than columns

    Bit for bit what torch.optim.Muon computes, except where the sum of squares overflows: there torch divides by
    infinity, and the update is 0. Scaling by a power of two is exact, so the result is that of the scaled matrix.

    Args:
        matrix_MN: [M, N] in bfloat16, contiguous.
        steps: iterations.
    """
    assert matrix_MN.dtype == torch.bfloat16, "Newton-Schulz runs in bfloat16"
    assert matrix_MN.is_contiguous(), "not one dense matrix"
    a, b, c = COEFFICIENTS
    tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    x = matrix_MN.T if tall else matrix_MN  # not made dense: oneDNN's products would have other bits then
    x.mul_(torch.where(torch.isinf(x.norm()), _TO_FINITE_NORM, 1.0).to(x.dtype))
    x.div_(x.norm().clamp(min=SMALLEST_NORM))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def lr_factor(rows: int, columns: int, adjust: AdjustLR) -> float:
    """Factor of the learning rate for a matrix of this shape.

    "match_rms_adamw" makes the root mean square of an update about 0.2, AdamW's usual one: Liu et al. 2025,
    arXiv:2502.16982, section 2.2. "original" is that of Jordan et al. 2024.
    """
    if adjust == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
