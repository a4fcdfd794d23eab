"""Time causal bfloat16 attention, forward and backward.

    python scripts/bench/attention.py                   # on a CPU: in bfloat16, and computed in float32
    python scripts/bench/attention.py --device cuda     # on a GPU: every kernel of torch's SDPA at the races' shapes

The contestants take turns; medians of 15, in milliseconds. On a CPU with one thread: titan_cpt/models/common/ops.py
uses float32 for small heads (positions x features). On a GPU "nan" is a kernel that does not take the shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from titan_cpt.common.process_settings import keep_freed_memory

TURNS = 15
# race, batch, positions, query heads, key/value heads, features
GPU_SHAPES = (
    ("Q", 16, 256, 8, 8, 32),
    ("G405", 8, 2048, 16, 16, 64),
    ("L1B", 4, 2048, 32, 4, 64),
    ("W4096", 2, 4096, 32, 8, 128),
)
TOKENS_X_WIDTH = 4096 * 128  # of one call, the same for every shape


def milliseconds(q_BNLH: Tensor, dtype: torch.dtype) -> float:
    """Time of one forward and backward pass; inputs and result are bfloat16."""
    inputs = [q_BNLH.clone().requires_grad_() for _ in range(3)]
    begin = time.perf_counter()
    out_BNLH = F.scaled_dot_product_attention(*(x.to(dtype) for x in inputs), is_causal=True)
    out_BNLH.to(q_BNLH.dtype).backward(q_BNLH)
    return 1e3 * (time.perf_counter() - begin)


def kernel_milliseconds(q_BNLH: Tensor, k_BMLH: Tensor, backend: SDPBackend) -> float:
    """Time of one forward and backward pass of a kernel on the GPU; NaN if it does not take these inputs."""
    inputs = [x.clone().requires_grad_() for x in (q_BNLH, k_BMLH, k_BMLH)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        with sdpa_kernel(backend):
            begin.record()
            out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=q_BNLH.shape != k_BMLH.shape)
            out.backward(q_BNLH)
            end.record()
    except RuntimeError:
        return float("nan")
    end.synchronize()
    return float(begin.elapsed_time(end))


def on_gpu() -> None:
    """Print one line for each shape of the races on a GPU."""
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| race | batch x positions | heads | features | cuDNN | flash | efficient |\n|---|---|---|---|---|---|---|")
    for race, batch, positions, heads, groups, features in GPU_SHAPES:
        q, k = (
            torch.randn(batch, positions, n, features, device="cuda").bfloat16().transpose(1, 2)
            for n in (heads, groups)
        )
        turns = [[kernel_milliseconds(q, k, backend) for backend in backends] for _ in range(TURNS + 1)][1:]
        cells = " | ".join(f"{statistics.median(times):.2f}" for times in zip(*turns, strict=True))
        print(f"| {race} | {batch} x {positions:,} | {heads} / {groups} | {features} | {cells} |", flush=True)


def main(words: list[str]) -> None:
    """Print one line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    if parser.parse_args(words).device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("attention.py: torch finds no GPU")
        return on_gpu()
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
    main(sys.argv[1:])
