"""Batch: what the data loader returns for a micro-batch. Shapes: B sequences, L positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from titan_cpt.models.common.document_attention import DocumentBounds

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
        bounds: of the documents in starts_BL; None without it, and if it was made on a GPU.
    """

    inputs_BL: Tensor
    targets_BL: Tensor
    starts_BL: Tensor | None = None
    positions_BL: Tensor | None = None
    sources_B: Tensor | None = None
    bounds: DocumentBounds | None = None

    @property
    def tensors(self) -> dict[str, Any]:
        """The tensors that are set, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def chunk(self, parts: int) -> list[Batch]:
        """The batch in at most this number of parts of consecutive sequences, as `Tensor.chunk` splits them."""
        split = [tensor.chunk(parts) for tensor in self.tensors.values()]
        return [replace(self, **dict(zip(self.tensors, of_part, strict=True))) for of_part in zip(*split, strict=True)]

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; torch's data loader calls this."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self.tensors.items()})
