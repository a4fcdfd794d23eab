"""Batch: what the data loader returns for a micro-batch. Shapes: B sequences, L positions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

NO_TARGET = -1
"""The target of a position that the loss ignores: the last one of a packed document, and padding."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank.

    Attributes:
        inputs_BL: token ids, int64.
        targets_BL: the next token's id at every position, int64; NO_TARGET where there is none.
        starts_BL: first position of the document that each position belongs to, int32; None without a document mask.
        positions_BL: RoPE's position of each token, int32; None without document positions: 0, 1, 2 ...
        sources_B: number of each sequence's source, as in `StagePlan.source_numbers`, int64; None if not requested.
    """

    inputs_BL: Tensor
    targets_BL: Tensor
    starts_BL: Tensor | None = None
    positions_BL: Tensor | None = None
    sources_B: Tensor | None = None

    def chunk(self, parts: int) -> list[Batch]:
        """The batch in at most this number of parts of consecutive sequences, as `Tensor.chunk` splits them."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        count = len(self.inputs_BL.chunk(parts))
        split = [[None] * count if tensor is None else tensor.chunk(parts) for tensor in fields]
        return [Batch(*of_part) for of_part in zip(*split, strict=True)]

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; torch's data loader calls this."""
        return Batch(
            self.inputs_BL.pin_memory(),
            self.targets_BL.pin_memory(),
            None if self.starts_BL is None else self.starts_BL.pin_memory(),
            None if self.positions_BL is None else self.positions_BL.pin_memory(),
            None if self.sources_B is None else self.sources_B.pin_memory(),
        )
