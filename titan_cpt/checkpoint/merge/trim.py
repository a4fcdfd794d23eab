"""The smallest magnitude that trimming keeps of a task vector, found without holding the vector in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

_HALF_BITS = 16  # of a float32; its sign bit is 0 here
_BINS = 1 << _HALF_BITS


def kept_count(density: float, size: int) -> int:
    """The number of weights that a density keeps of `size`, rounded up, with the density as it was written."""
    return math.ceil(Fraction(repr(density)) * size)


def magnitude_thresholds(magnitudes: Callable[[], Iterable[Sequence[Tensor]]], keep: int) -> list[float]:
    """For each vector its `keep`-th largest magnitude. Elements that equal it are all kept.

    The bits of float32 numbers of one sign are ordered as the numbers are, so a histogram of the upper 16 bits, and one
    of the lower 16 bits within the bin that holds the result, give it exactly, in two passes and little memory.

    Args:
        magnitudes: starts a pass: yields a block of each vector at a time, float32, 0 or more.
        keep: 1 or more.
    """
    upper: list[Tensor] = []
    for blocks in magnitudes():
        upper = upper or [torch.zeros(_BINS, dtype=torch.int64) for _ in blocks]
        for total, block in zip(upper, blocks, strict=True):
            total += _histogram(_bits(block) >> _HALF_BITS)
    bins = [_bin_from_above(counts, keep) for counts in upper]
    lower = [torch.zeros(_BINS, dtype=torch.int64) for _ in bins]
    for blocks in magnitudes():
        for counts, (index, _), block in zip(lower, bins, blocks, strict=True):
            bits = _bits(block)
            counts += _histogram(bits[bits >> _HALF_BITS == index] & (_BINS - 1))
    return [
        _number(index << _HALF_BITS | _bin_from_above(counts, rest)[0])
        for counts, (index, rest) in zip(lower, bins, strict=True)
    ]


def _bits(magnitudes: Tensor) -> Tensor:
    return magnitudes.flatten().view(torch.int32)


def _number(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()


def _histogram(values: Tensor) -> Tensor:
    return torch.bincount(values, minlength=_BINS)


def _bin_from_above(counts: Tensor, keep: int) -> tuple[int, int]:
    """The bin of the `keep`-th largest element, and which of the bin's elements from above it is."""
    from_above = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(from_above, keep))
    above = int(from_above[at - 1]) if at else 0
    return _BINS - 1 - at, keep - above
