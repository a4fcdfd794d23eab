"""Time matrix products on this CPU: float32 by MKL and by oneDNN; bfloat16 by torch, and in float32 and rounded.

    python scripts/bench/products.py

The kinds take turns; medians of 5, in GFLOP per second of processor time, one thread. Shapes are those of a small
model's layers and head, 4,096 tokens at once: forward, the gradient of the input, the gradient of the weight. titan_cpt
takes oneDNN on request (training.enable_onednn), and rounded products on a CPU without bfloat16 instructions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from titan_cpt.common.process_settings import keep_freed_memory
from titan_cpt.models.common import ops

TURNS = 5
TOKENS = 4096
LAYERS = ((128, 512), (512, 128), (128, 4096))  # features in, features out


def gflops(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
    """GFLOP per second of processor time of one product."""
    begin = time.process_time()
    product(left, right)
    return 2e-9 * left.shape[0] * left.shape[1] * right.shape[1] / (time.process_time() - begin)


def by_onednn(left: Tensor, right: Tensor) -> Tensor:
    """The product of two float32 matrices by oneDNN, on any CPU."""
    return ops._onednn_product(left, right.t())


def error(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
    """Root mean square of a product's error, relative to that of the exact product."""
    exact = left.double() @ right.double()
    return float((product(left, right).double() - exact).norm() / exact.norm())


def main() -> None:
    """Print one line for each product."""
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"bfloat16 instructions according to torch: {ops.CPU_HAS_BFLOAT16}")
    print(f"training.enable_onednn has an effect: {ops.onednn_is_faster()}\n")
    ops.CPU_HAS_BFLOAT16 = False  # so that both are measured on any machine
    kinds = ("float32, MKL", "float32, oneDNN", "bfloat16, torch's", "bfloat16, in float32 and rounded")
    print("| " + " | ".join(["product", *kinds, "error, MKL", "error, oneDNN"]) + " |")
    print("|---" * 7 + "|")
    for features, outputs in LAYERS:
        x, weight, grad = torch.randn(TOKENS, features), torch.randn(outputs, features), torch.randn(TOKENS, outputs)
        pairs = {"forward": (x, weight.t()), "input's": (grad, weight), "weight's": (grad.t(), x)}
        for name, (left, right) in pairs.items():
            halves = left.bfloat16(), right.bfloat16()
            turns = [
                (
                    gflops(torch.mm, left, right),
                    gflops(by_onednn, left, right),
                    gflops(torch.mm, *halves),
                    gflops(ops.multiply, *halves),
                )
                for _ in range(TURNS)
            ]
            cells = " | ".join(f"{statistics.median(rates):.1f}" for rates in zip(*turns, strict=True))
            errors = f"{error(torch.mm, left, right):.1e} | {error(by_onednn, left, right):.1e}"
            print(f"| {features} to {outputs}, {name} | {cells} | {errors} |", flush=True)


if __name__ == "__main__":
    main()
