"""Chunk size of the fused linear cross-entropy, for the loss and for the memory estimate. Does not import torch."""

from __future__ import annotations

LOGITS_CHUNK = 2**26
"""Logits that exist at a time in the fused linear cross-entropy; 128 MiB in bfloat16."""
