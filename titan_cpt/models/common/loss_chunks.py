"""Chunk size of the fused linear cross-entropy, for the loss and for the memory estimate. Does not import torch."""

from __future__ import annotations

LOGITS_CHUNK = 2**26
"""Number of logits in memory at a time (128 MiB in bfloat16); a batch has ceil(logits / LOGITS_CHUNK) chunks."""
