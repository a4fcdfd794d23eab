"""Chunk size of the fused linear cross-entropy, for the loss and for the memory estimate. Does not import torch."""

from __future__ import annotations

LOGITS_CHUNK = 2**26
"""Number of logits in memory at a time (128 MiB in bfloat16); a batch has ceil(logits / LOGITS_CHUNK) chunks."""
_LARGEST_CHUNK = 2**28  # 512 MiB in bfloat16
_SHARE = 128  # of a GPU's memory that a chunk in bfloat16 may take, as a divisor


def logits_chunk(device_bytes: int) -> int:
    """Number of logits in memory at a time on a GPU with this much memory, at least `LOGITS_CHUNK`.

    Fewer chunks add the float32 gradient of the head's weight to memory fewer times.
    """
    return max(LOGITS_CHUNK, min(_LARGEST_CHUNK, device_bytes // _SHARE // 2))
