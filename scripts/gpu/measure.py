"""What the checks run in processes of their own: device ceilings, a training run, peak memory, CPU losses."""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def train(arguments: list[str]) -> int:
    """`titan-cpt train` with these arguments; exits with its status if that is not 0."""
    from titan_cpt.cli import main

    try:
        main(["train", *arguments])
    except SystemExit as end:
        if end.code:
            raise
    return 0


def torchrun(ranks: int, arguments: list[str]) -> int:
    """`titan-cpt train` on several ranks of this machine; exits with torchrun's status if that is not 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    status = subprocess.run([*command, "-m", "titan_cpt", "train", *arguments], check=False).returncode
    if status:
        raise SystemExit(status)
    return 0


def describe() -> dict[str, Any]:
    """Device, driver and versions."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "cuda_available": torch.cuda.is_available(),
        "gpus": torch.cuda.device_count(),
    }
    for package in ("triton", "torchao", "transformers", "litgpt", "torchtitan"):
        found[package] = _version(package)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "capability": list(torch.cuda.get_device_capability(0)),
            "driver": _driver(),
        }
    else:
        found["device"] = platform.machine()
    return found


def ceilings(device: str, size: int, copied_bytes: int) -> dict[str, float | None]:
    """FLOP/s of a bfloat16 and a float8 product of `size`^3, and bytes/s of a copy, read and written; random data.

    A product of zeros is faster than one of random numbers. The buffers of the copy exceed every cache.
    """
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    products = timed(lambda: torch.mm(left, right), device)
    source = torch.randint(0, 255, (copied_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copies = timed(lambda: target.copy_(source), device)
    flop = 2.0 * size**3
    result: dict[str, float | None] = {
        "bf16_product_flops": flop / products,
        "copy_bytes_per_s": 2 * copied_bytes / copies,
        "float8_product_flops": None,
    }
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device=device)
        low_left, low_right = left.to(torch.float8_e4m3fn), right.t().contiguous().to(torch.float8_e4m3fn).t()

        def product() -> object:
            return torch._scaled_mm(low_left, low_right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        result["float8_product_flops"] = flop / timed(product, device)
    return result


def timed(work: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Median seconds of one call, after three that warm up; on a GPU measured with events."""
    for _ in range(3):
        work()
    seconds = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            since = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - since)
    return statistics.median(seconds)


def peak_memory(name: str, folder: str, *, tiny: bool) -> dict[str, int]:
    """`planned`, `measured` and on a GPU `reserved` bytes of a configuration of scripts/bench/memory.py."""
    memory = memory_bench()
    overrides = memory.ON_CUDA[name][1]
    os.chdir(folder)
    memory.work(memory.tiny(overrides) if tiny else dict(overrides))
    found: dict[str, int] = json.loads(Path("rank-0.json").read_text())
    return found


def memory_bench() -> Any:
    """scripts/bench/memory.py."""
    bench = str(Path(__file__).resolve().parents[1] / "bench")
    if bench not in sys.path:
        sys.path.append(bench)
    return importlib.import_module("memory")


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        print("nvidia-smi gave no driver version", file=sys.stderr)
        return None
