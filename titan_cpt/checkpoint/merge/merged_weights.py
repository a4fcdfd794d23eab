"""The weights of a merge, computed one at a time from blocks of rows of the inputs.

Memory is a block of each input in float64 and one weight of the result in float32. The inputs are summed in the order
of their digests, so their order on the command line changes no bit of the result. The two of slerp have roles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from titan_cpt.checkpoint.hf_release import weight_shapes
from titan_cpt.checkpoint.merge import methods
from titan_cpt.checkpoint.merge.inputs import MergeInput
from titan_cpt.checkpoint.merge.settings import MergeSettings
from titan_cpt.checkpoint.merge.trim import kept_count, magnitude_thresholds
from titan_cpt.errors import CheckpointError

BLOCK_ELEMENTS = 1 << 20  # 8 MiB in float64


class MergedWeights:
    """Merges the weights of models of one architecture.

    Attributes:
        total_elements: the number that the calls of `advance` add up to.
        advance: called with the number of elements of each block that was merged or searched.
    """

    def __init__(
        self,
        inputs: Sequence[MergeInput],
        base: MergeInput | None,
        settings: MergeSettings,
        *,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        """Merge `inputs`, and `base` for methods that merge task vectors.

        Args:
            block_elements: elements of a weight that are read at a time, unless a row has more.
        """
        pairs = list(zip(inputs, settings.weights, strict=True))
        if settings.method != "slerp":
            pairs.sort(key=lambda pair: (pair[0].digest, pair[0].part, pair[1]))
        self._inputs = [one for one, _ in pairs]
        self._weights = [weight for _, weight in pairs]
        self._base = base
        self._settings = settings
        self._block_elements = block_elements
        self._shapes = weight_shapes(inputs[0].spec)
        self._thresholds = [0.0] * len(pairs)
        self._elements = sum(map(math.prod, self._shapes.values()))
        self._trims = settings.method == "ties" and settings.density < 1
        self.total_elements = self._elements * (3 if self._trims else 1)
        self.advance: Callable[[int], None] = lambda elements: None

    def find_thresholds(self) -> None:
        """Find what TIES trims: reads all inputs twice. Nothing to do for other methods."""
        if self._trims:
            keep = kept_count(self._settings.density, self._elements)
            self._thresholds = magnitude_thresholds(self._magnitudes, keep)

    def read(self, name: str) -> Tensor:
        """A merged weight, rounded once to float32.

        Raises:
            CheckpointError: an input cannot be read, the weight is not finite, or slerp is not defined for it.
        """
        factors = self._slerp_factors(name) if self._settings.method == "slerp" else (0.0, 0.0)
        merged = torch.empty(self._shapes[name])
        for rows in self._rows(name):
            merged[rows] = self._merge(name, rows, factors)
            if not torch.isfinite(merged[rows]).all():
                raise CheckpointError(f"merge: {name} would not be finite: {self._why_not_finite(name, rows)}")
            self.advance(merged[rows].numel())
        return merged

    def _merge(self, name: str, rows: slice, factors: Sequence[float]) -> Tensor:
        method, scale = self._settings.method, self._settings.scale
        blocks = self._blocks(name, rows)
        if method == "slerp":
            return methods.weighted_sum(blocks, factors)
        if method == "ties":
            return methods.ties(self._base_block(name, rows), blocks, self._weights, self._thresholds, scale)
        if method == "task-arithmetic":
            return methods.task_arithmetic(self._base_block(name, rows), blocks, self._weights, scale)
        return methods.weighted_mean(blocks, self._weights)

    def _slerp_factors(self, name: str) -> tuple[float, float]:
        dot, square, other_square = 0.0, 0.0, 0.0
        for rows in self._rows(name):
            one, other = (block.flatten() for block in self._blocks(name, rows))
            dot += float(one @ other)
            square += float(one @ one)
            other_square += float(other @ other)
        factors = methods.slerp_factors(dot, (square, other_square), self._settings.shares[1])
        if factors is None:
            raise CheckpointError(
                f"merge: {name} points in opposite directions in the inputs, so slerp is not defined for it: use linear"
            )
        return factors

    def _magnitudes(self) -> Iterator[list[Tensor]]:
        """The magnitudes of all task vectors, block by block, in float32."""
        for name in self._shapes:
            for rows in self._rows(name):
                base = self._base_block(name, rows)
                yield [(block - base).abs().float() for block in self._blocks(name, rows)]
                self.advance(base.numel())

    def _blocks(self, name: str, rows: slice) -> list[Tensor]:
        return [one.read(name, rows).double() for one in self._inputs]

    def _base_block(self, name: str, rows: slice) -> Tensor:
        assert self._base is not None, "merge_settings requires it"
        return self._base.read(name, rows).double()

    def _rows(self, name: str) -> Iterator[slice]:
        length, *others = self._shapes[name]
        step = max(1, self._block_elements // max(1, math.prod(others)))
        yield from (slice(first, min(first + step, length)) for first in range(0, length, step))

    def _why_not_finite(self, name: str, rows: slice) -> str:
        with suppress(CheckpointError):  # of a release with such values, which says so itself
            for one in (*self._inputs, *([self._base] if self._base else [])):
                if not torch.isfinite(one.read(name, rows)).all():
                    return f"{one.name} has values that are NaN or infinite"
        return "use smaller weights or a smaller scale"
