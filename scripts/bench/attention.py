"""Time causal bfloat16 attention on a CPU, forward and backward: in bfloat16, and computed in float32.

    python scripts/bench/attention.py

The two take turns; medians of 15, in milliseconds, one thread. titan_cpt/models/common/ops.py uses float32 for small
heads (positions x features).
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_cpt.common.allocator import keep_freed_memory

TURNS = 15
TOKENS_X_WIDTH = 4096 * 128  # of one call, the same for every shape


def milliseconds(q_BNLH: Tensor, dtype: torch.dtype) -> float:
    """Time of one forward and backward pass; inputs and result are bfloat16."""
    inputs = [q_BNLH.clone().requires_grad_() for _ in range(3)]
    begin = time.perf_counter()
    out_BNLH = F.scaled_dot_product_attention(*(x.to(dtype) for x in inputs), is_causal=True)
    out_BNLH.to(q_BNLH.dtype).backward(q_BNLH)
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    """Print one line for each shape."""
    torch.set_num_threads(1)
    keep_freed_memory()
    print("| positions | features | bfloat16 | float32 | ratio |\n|---|---|---|---|---|")
    for features in (32, 64, 128):
        for positions in (64, 128, 256, 512, 1024):
            heads = 4
            batch = TOKENS_X_WIDTH // (positions * features * heads)
            q_BNLH = torch.randn(batch, positions, heads, features).bfloat16().transpose(1, 2)
            turns = [[milliseconds(q_BNLH, dtype) for dtype in (torch.bfloat16, torch.float32)] for _ in range(TURNS)]
            native, upcast = (statistics.median(times) for times in zip(*turns, strict=True))
            print(f"| {positions} | {features} | {native:.1f} | {upcast:.1f} | {native / upcast:.2f} |", flush=True)


if __name__ == "__main__":
    main()
