"""Where documents begin in sequences of tokens, from the end-of-document ids. Shapes: B sequences, L positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titan_cpt.data.batch import Batch
from titan_cpt.models.common.document_attention import document_bounds


@dataclass(frozen=True)
class DocumentSettings:
    """How a stage treats the documents of a sequence.

    Attributes:
        end: the end-of-document id, which belongs to the document that it ends.
        mask: attention stays within a document.
        positions: RoPE's positions begin at 0 in each document.
    """

    end: int
    mask: bool
    positions: bool

    def added_to(self, batch: Batch, pieces: Sequence[Sequence[int]] = ()) -> Batch:
        """The batch with `starts_BL`, its bounds and `positions_BL`, as far as they are set.

        Args:
            pieces: as `Rows.starts`.
        """
        starts_BL = document_starts(batch.inputs_BL, self.end, pieces)
        places_L = torch.arange(starts_BL.shape[1], dtype=torch.int32, device=starts_BL.device)
        return replace(
            batch,
            starts_BL=starts_BL if self.mask else None,
            bounds=document_bounds(starts_BL) if self.mask and starts_BL.device.type == "cpu" else None,
            positions_BL=places_L - starts_BL if self.positions else None,
        )


def document_settings(end: int, *, mask: bool, positions: bool) -> DocumentSettings | None:
    """The settings; None without document mask and positions."""
    return DocumentSettings(end, mask, positions) if mask or positions else None


def document_starts(inputs_BL: Tensor, end: int, pieces: Sequence[Sequence[int]] = ()) -> Tensor:
    """For each position the first position of its document, int32 [B, L]. Does not synchronize with a device.

    A document begins at position 0, after each end-of-document id, and where a piece begins. Two of these ids in
    succession are an empty document: the second one by itself.

    Args:
        inputs_BL: token ids.
        end: the end-of-document id.
        pieces: for each sequence further positions, in ascending order, where a piece begins that does not continue the
            text before.
    """
    begins_BL = torch.zeros_like(inputs_BL, dtype=torch.bool)
    begins_BL[:, 1:] = inputs_BL[:, :-1] == end
    for row, places in enumerate(pieces):
        begins_BL[row, [place for place in places if place < begins_BL.shape[1]]] = True
    places_L = torch.arange(inputs_BL.shape[1], dtype=torch.int32, device=inputs_BL.device)
    return torch.where(begins_BL, places_L, 0).cummax(dim=1).values
