"""KV cache for generation, installed into a model without changing its code.

While the cache is in use, `CachedAttention` replaces each block's `attention.core`. Sequences of a batch may have
different lengths: they start at position 0 and are padded at the end. No real token attends to padding: causal
attention hides it from the tokens before it, and new tokens overwrite it in the cache before later ones attend to it.

Shape letters: B sequences, L new positions, S positions of the cache, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import RotaryCausalAttention
from titan_cpt.models.common.ops import attention


class CachePositions:
    """Number of cached tokens of each sequence of a batch, shared by all layers.

    Attributes:
        starts_B: position of each sequence's next token, int64.
        capacity: S, the number of positions that the cache can hold.
    """

    def __init__(self, sequences: int, capacity: int, device: torch.device) -> None:
        self.starts_B = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.capacity = capacity


class CachedAttention(nn.Module):
    """Replaces `RotaryCausalAttention` while a cache is in use; no weights."""

    def __init__(self, plain: RotaryCausalAttention, positions: CachePositions) -> None:
        super().__init__()
        self.plain, self.positions = plain, positions
        self.k_BNSH: Tensor | None = None
        self.v_BNSH: Tensor | None = None

    def forward(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, documents: None = None) -> Tensor:
        """Attention's output for the new positions, out_BLNH; their keys and values are added to the cache."""
        assert documents is None, "a generated sequence is one document"
        length = q_BLNH.shape[1]
        plain = self.plain
        positions_BL = self.positions.starts_B[:, None] + torch.arange(length, device=q_BLNH.device)
        q_BNLH, k_BNLH = plain.rotated(q_BLNH.transpose(1, 2), k_BLNH.transpose(1, 2), positions_BL)
        v_BNLH = v_BLNH.transpose(1, 2)
        if self.k_BNSH is None or self.v_BNSH is None:  # the first call, with the prompts
            room = (0, 0, 0, self.positions.capacity - length)
            self.k_BNSH = F.pad(k_BNLH, room)
            self.v_BNSH = F.pad(v_BNLH, room)
            return plain.attend(q_BNLH, k_BNLH, v_BNLH).transpose(1, 2)
        at_BNLH = positions_BL[:, None, :, None].expand_as(k_BNLH)
        self.k_BNSH.scatter_(2, at_BNLH, k_BNLH)
        self.v_BNSH.scatter_(2, at_BNLH, v_BNLH)
        behind_BLS = positions_BL[:, :, None] - torch.arange(self.positions.capacity, device=q_BLNH.device)
        seen_BLS = behind_BLS >= 0
        if plain.window is not None:
            seen_BLS &= behind_BLS < plain.window
        group = q_BNLH.shape[1] // k_BNLH.shape[1]
        out_BNLH = attention(q_BNLH, self.k_BNSH, self.v_BNSH, attn_mask=seen_BLS[:, None], enable_gqa=group > 1)
        return out_BNLH.transpose(1, 2)


class KVCache:
    """Keys and values of one batch in all layers."""

    def __init__(self, cores: list[CachedAttention], positions: CachePositions) -> None:
        self._cores, self._positions = cores, positions

    def advance(self, lengths_B: Tensor) -> None:
        """Count the new tokens of each sequence, without padding; call after each call of the model."""
        self._positions.starts_B += lengths_B

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these sequences of the batch, in this order."""
        self._positions.starts_B = self._positions.starts_B[rows]
        for core in self._cores:
            for name in ("k_BNSH", "v_BNSH"):
                setattr(core, name, getattr(core, name)[rows])


@contextmanager
def kv_cache(model: LanguageModel, *, sequences: int, capacity: int, device: torch.device) -> Iterator[KVCache]:
    """Give a model a KV cache within the block: each call takes only the tokens that follow those of earlier calls.

    Args:
        model: a whole model, without tensor, context or pipeline parallelism; FSDP2 may shard it.
        sequences: number of sequences of the first call.
        capacity: maximum number of tokens of padded prompt and continuation together.
        device: device of the tokens.
    """
    positions = CachePositions(sequences, capacity, device)
    attentions = model.attentions()
    original = [cast(RotaryCausalAttention, attention.core) for attention in attentions]
    cores = [CachedAttention(core, positions) for core in original]
    try:
        for attention, core in zip(attentions, cores, strict=True):
            attention.core = core
        yield KVCache(cores, positions)
    finally:
        for attention, plain in zip(attentions, original, strict=True):
            attention.core = plain
