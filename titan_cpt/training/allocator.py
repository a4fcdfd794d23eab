"""Makes glibc keep freed memory in the process: every training step allocates the same sizes again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # M_... of glibc's malloc.h
_GROWTH_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Configure glibc's malloc not to return freed memory to the kernel; returns whether that worked.

    By default every large tensor is mapped and unmapped, and the kernel clears its pages each time. Under another
    allocator (LD_PRELOAD) or C library this changes nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    numbers = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _GROWTH_BYTES))
    return bool(sum(mallopt(name, value) for name, value in numbers) == len(numbers))
