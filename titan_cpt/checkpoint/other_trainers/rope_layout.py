"""The order of features in a head: RoPE rotates pairs of them, and trainers differ in which features are a pair.

Ours, transformers' and GPT-NeoX's: feature i and feature i + H/2 (halves). Meta's and torchtitan's Llama: features 2i
and 2i + 1 (interleaved). The rows of the query and key weights, of their biases and of their moments are in that order.
Shape letters: N heads, H head width.
"""

from __future__ import annotations

from torch import Tensor


def halves_from_interleaved(rows: Tensor, head_width: int) -> Tensor:
    """Rows (N x H, ...) in our order: of each head first the first features of all pairs, then the second ones."""
    rest = rows.shape[1:]
    return rows.reshape(-1, head_width // 2, 2, *rest).transpose(1, 2).reshape(rows.shape)


def interleaved_from_halves(rows: Tensor, head_width: int) -> Tensor:
    """The inverse of `halves_from_interleaved`."""
    rest = rows.shape[1:]
    return rows.reshape(-1, 2, head_width // 2, *rest).transpose(1, 2).reshape(rows.shape)
