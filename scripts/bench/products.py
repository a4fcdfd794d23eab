"""Time bfloat16 matrix products on this CPU: torch's own, and titan_cpt's for CPUs without bfloat16 instructions.

    python scripts/bench/products.py

The three kinds take turns; medians of 5, in GFLOP/s, one thread. Shapes are those of a small model's layers and head,
4,096 tokens at once: forward, the gradient of the input, the gradient of the weight.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from titan_cpt.common.allocator import keep_freed_memory
from titan_cpt.models.common import ops

TURNS = 5
TOKENS = 4096
LAYERS = ((128, 512), (512, 128), (128, 4096))  # features in, features out


def gflops(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
    """GFLOP/s of one product."""
    begin = time.perf_counter()
    product(left, right)
    return 2e-9 * left.shape[0] * left.shape[1] * right.shape[1] / (time.perf_counter() - begin)


def main() -> None:
    """Print one line for each product."""
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"bfloat16 instructions according to torch: {ops.CPU_HAS_BFLOAT16}\n")
    ops.CPU_HAS_BFLOAT16 = False  # so that both are measured on any machine
    print("| product | float32 | bfloat16, torch's | bfloat16, in float32 and rounded |\n|---|---|---|---|")
    for features, outputs in LAYERS:
        x, weight, grad = torch.randn(TOKENS, features), torch.randn(outputs, features), torch.randn(TOKENS, outputs)
        pairs = {"forward": (x, weight.t()), "input's": (grad, weight), "weight's": (grad.t(), x)}
        for name, (left, right) in pairs.items():
            halves = left.bfloat16(), right.bfloat16()
            turns = [
                (gflops(torch.mm, left, right), gflops(torch.mm, *halves), gflops(ops.multiply, *halves))
                for _ in range(TURNS)
            ]
            cells = " | ".join(f"{statistics.median(rates):.1f}" for rates in zip(*turns, strict=True))
            print(f"| {features} to {outputs}, {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
