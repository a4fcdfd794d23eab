"""Keys and values of earlier positions, kept so that the next token costs one position; put into a model from outside.

A model knows nothing of it: attention's core is a module of its own, and while a cache is in use another one stands in
its place. Sequences of a batch may differ in length: they begin at position 0 and are filled up at the end, and what
was filled in is never looked at, because it is overwritten before any query stands behind it.

Shape letters: B sequences, L new positions, S positions kept, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import RotaryCausalAttention, rotary_tables, rotate
from titan_cpt.models.common.ops import attention


class CachePositions:
    """How far each sequence of a batch has come; one for all layers.

    Attributes:
        starts_B: position of the first new token of each sequence.
        capacity: S, positions that there is room for.
    """

    def __init__(self, sequences: int, capacity: int, device: torch.device) -> None:
        self.starts_B, self.capacity = torch.zeros(sequences, dtype=torch.int64, device=device), capacity


class CachedAttention(nn.Module):
    """Takes the place of `RotaryCausalAttention` while a batch is continued; no weights."""

    def __init__(self, plain: RotaryCausalAttention, progress: CachePositions) -> None:
        super().__init__()
        self.plain, self.progress = plain, progress
        self.k_BNSH: Tensor | None = None
        self.v_BNSH: Tensor | None = None

    def forward(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        """Attention's result for the new positions, out_BLNH; their keys and values are kept."""
        (sequences, length), plain = q_BLNH.shape[:2], self.plain
        positions_BL = self.progress.starts_B[:, None] + torch.arange(length, device=q_BLNH.device)
        tables = rotary_tables(
            positions_BL.flatten(), rotary_width=plain.rotary_width, base=plain.rope_base, scaling=plain.scaling
        )
        cos_B1LR, sin_B1LR = (table.view(sequences, 1, length, -1) for table in tables)
        q_BNLH = rotate(q_BLNH.transpose(1, 2), cos_B1LR, sin_B1LR)
        k_BNLH, v_BNLH = rotate(k_BLNH.transpose(1, 2), cos_B1LR, sin_B1LR), v_BLNH.transpose(1, 2)
        if self.k_BNSH is None or self.v_BNSH is None:  # the prompts
            room = (0, 0, 0, self.progress.capacity - length)
            self.k_BNSH, self.v_BNSH = F.pad(k_BNLH, room), F.pad(v_BNLH, room)
            return plain.attend(q_BNLH, k_BNLH, v_BNLH).transpose(1, 2)
        at_BNLH = positions_BL[:, None, :, None].expand_as(k_BNLH)
        self.k_BNSH.scatter_(2, at_BNLH, k_BNLH)
        self.v_BNSH.scatter_(2, at_BNLH, v_BNLH)
        behind_BLS = positions_BL[:, :, None] - torch.arange(self.progress.capacity, device=q_BLNH.device)
        seen_BLS = behind_BLS >= 0
        if plain.window is not None:
            seen_BLS &= behind_BLS < plain.window
        shared_by = q_BNLH.shape[1] // k_BNLH.shape[1]
        out_BNLH = attention(q_BNLH, self.k_BNSH, self.v_BNSH, attn_mask=seen_BLS[:, None], enable_gqa=shared_by > 1)
        return out_BNLH.transpose(1, 2)


class Cache:
    """What is kept of one batch, in all layers."""

    def __init__(self, cores: list[CachedAttention], progress: CachePositions) -> None:
        self._cores, self._progress = cores, progress

    def advance(self, lengths_B: Tensor) -> None:
        """Count what was just put into the model: so many tokens of each sequence, without what was filled in."""
        self._progress.starts_B += lengths_B

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences of the batch alone, in this order."""
        self._progress.starts_B = self._progress.starts_B[rows]
        for core in self._cores:
            for name in ("k_BNSH", "v_BNSH"):
                setattr(core, name, getattr(core, name)[rows])


@contextmanager
def kv_cache(model: LanguageModel, *, sequences: int, capacity: int, device: torch.device) -> Iterator[Cache]:
    """Within it the model takes the tokens that follow those of the calls before; after it, it is as it was.

    Args:
        model: with all its layers and whole sequences on this rank; it may be sharded by FSDP2.
        sequences: B of the first call.
        capacity: the longest that prompt and continuation together may become.
    """
    progress = CachePositions(sequences, capacity, device)
    attentions = [cast(nn.Module, block.attention) for block in model.blocks.values()]
    plain = [cast(RotaryCausalAttention, attention.core) for attention in attentions]
    cores = [CachedAttention(core, progress) for core in plain]
    try:
        for attention, core in zip(attentions, cores, strict=True):
            attention.core = core
        yield Cache(cores, progress)
    finally:
        for attention, its_own in zip(attentions, plain, strict=True):
            attention.core = its_own
