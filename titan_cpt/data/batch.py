"""Batch: what the data loader returns for a micro-batch. Shapes: B sequences, L positions."""

from __future__ import annotations

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
        documents_BL: number of the document that each position belongs to, ascending within a sequence, int32; None
            without a document mask and document positions.
        sources_B: number of each sequence's source, as in `StagePlan.source_numbers`, int64; None if not requested.
    """

    inputs_BL: Tensor
    targets_BL: Tensor
    documents_BL: Tensor | None = None
    sources_B: Tensor | None = None

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; torch's data loader calls this."""
        return Batch(
            self.inputs_BL.pin_memory(),
            self.targets_BL.pin_memory(),
            None if self.documents_BL is None else self.documents_BL.pin_memory(),
            None if self.sources_B is None else self.sources_B.pin_memory(),
        )
