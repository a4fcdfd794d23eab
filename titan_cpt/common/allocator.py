"""Makes glibc keep freed memory in the process: every training step allocates the same sizes again."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt, M_... in glibc's malloc.h.
_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_MMAP_MAX = -4
_GROWTH_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Configure glibc's malloc not to return freed memory to the kernel; returns whether glibc accepted that.

    By default glibc maps and unmaps the memory of every large tensor, and the kernel clears its pages each time. Under
    another allocator (LD_PRELOAD) or C library this has no effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _GROWTH_BYTES))
    return bool(sum(mallopt(name, value) for name, value in settings) == len(settings))
