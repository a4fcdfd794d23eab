"""The formulas of merging, elementwise on blocks of weights in float64.

theta_i are the weights of input i, w_i its weight, base those of the base model. Every result is a convex or linear
combination of the inputs themselves, not of differences to the base: where all inputs have one value, so does the
result, to the last bit of float32. `sum` has a fixed order, so the caller decides which rounding it gets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_PARALLEL = 1e-7
"""Sine of the angle below which slerp is linear: the two then differ by less than 1e-14 of the weights."""
_OPPOSITE = -1 + 1e-6
"""Cosine below which two tensors count as opposite."""


def weighted_sum(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i theta_i."""
    total = torch.zeros_like(blocks[0])
    for block, weight in zip(blocks, weights, strict=True):
        total += weight * block
    return total


def weighted_mean(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i theta_i / sum_i w_i.

    With equal weights this is the average of checkpoints of one run.
    Source: Izmailov et al. 2018, arXiv:1803.05407, equation 1; Wortsman et al. 2022, arXiv:2203.05482 (several runs).
    """
    return weighted_sum(blocks, weights) / math.fsum(weights)


def task_arithmetic(base: Tensor, blocks: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
    """base + scale * sum_i w_i (theta_i - base), computed as (1 - scale * sum_i w_i) base + scale * sum_i w_i theta_i.

    Source: Ilharco et al. 2023, arXiv:2212.04089, section 2.
    """
    return (1 - scale * math.fsum(weights)) * base + scale * weighted_sum(blocks, weights)


def ties(
    base: Tensor, blocks: Sequence[Tensor], weights: Sequence[float], thresholds: Sequence[float], scale: float
) -> Tensor:
    """TIES: trim the task vectors, elect a sign for each weight, average the task vectors that have it.

        tau_i  = theta_i - base where |theta_i - base| >= threshold_i, else 0
        gamma  = sign(sum_i w_i tau_i)
        A      = { i : sign(tau_i) = gamma }
        result = base + scale * sum_(i in A) w_i tau_i / sum_(i in A) w_i

    computed as (1 - scale) base + scale * the weighted mean of theta_i over A. Where the sum is 0, no sign is elected
    and the result is the base's weight. With equal weights this is the paper's method.
    Source: Yadav et al. 2023, arXiv:2306.01708, section 4 and algorithm 1.

    Args:
        thresholds: of the magnitudes in float32, from `trim.magnitude_thresholds`.
    """
    vectors = []
    for block, threshold in zip(blocks, thresholds, strict=True):
        vector = block - base
        vectors.append(torch.where(vector.abs().float() >= threshold, vector, 0))
    elected = weighted_sum(vectors, weights).sign()
    total = torch.zeros_like(base)
    weight_of_agreeing = torch.zeros_like(base)
    for block, vector, weight in zip(blocks, vectors, weights, strict=True):
        agrees = (vector.sign() == elected) & (elected != 0)
        total += torch.where(agrees, weight * block, 0)
        weight_of_agreeing += torch.where(agrees, weight, 0.0)
    mean = total / weight_of_agreeing
    return torch.where(weight_of_agreeing > 0, (1 - scale) * base + scale * mean, base)


def slerp_factors(dot: float, squares: tuple[float, float], t: float) -> tuple[float, float] | None:
    """Factors of two tensors in their spherical linear interpolation; None if they point in opposite directions.

        cos(omega) = <a, b> / (|a| |b|)
        slerp(a, b, t) = sin((1 - t) omega) / sin(omega) a + sin(t omega) / sin(omega) b

    Parallel tensors, and two of which one is zero, are interpolated linearly: the first is the limit, and a zero tensor
    has no direction. Between opposite tensors no shortest arc is distinguished.
    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3.

    Args:
        dot: <a, b>.
        squares: |a|^2 and |b|^2.
        t: 0 for a, 1 for b.
    """
    lengths = math.sqrt(squares[0]) * math.sqrt(squares[1])
    if t in (0, 1) or lengths == 0:
        return 1 - t, t
    cosine = min(max(dot / lengths, -1.0), 1.0)
    if cosine < _OPPOSITE:
        return None
    omega = math.acos(cosine)
    if math.sin(omega) < _PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
