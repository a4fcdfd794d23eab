"""Settings of the whole process: ignored warnings, the C library's allocator, deterministic cuBLAS."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

_IGNORED_WARNINGS = (
    "'set_vital' is deprecated",  # raised inside torch when torchdata's loader starts
    "torch.distributed is disabled, unavailable or uninitialized",  # DCP in a single process, as intended
    "Warning: Profiler clears events at the end of each cycle",  # expected: profiler.py writes a trace per cycle
    "FSDP2-wrapped module .* returned a view tensor",  # a hint for models that modify the view in place
)


# Parameters of mallopt, M_... in glibc's malloc.h.
_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_MMAP_MAX = -4
_GROWTH_BYTES = 64 << 20


def configure_process(*, deterministic: bool) -> None:
    """Apply the settings; before CUDA starts, which reads that of cuBLAS."""
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def keep_freed_memory() -> bool:
    """Configure glibc's malloc not to return freed memory to the kernel; returns whether glibc accepted that.

    Every training step allocates the same sizes again. By default glibc maps and unmaps the memory of every large
    tensor, and the kernel clears its pages each time. Under another allocator (LD_PRELOAD) or C library this has no
    effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _GROWTH_BYTES))
    return bool(sum(mallopt(name, value) for name, value in settings) == len(settings))
