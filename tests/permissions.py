"""File modes that count, for tests that run as root: a process that gives up root's right to ignore them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2  # linux/capability.h
_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def modes_count() -> Iterator[None]:
    """Within the block this thread meets EACCES where an ordinary owner of the files would."""
    sets = _capabilities()
    before = sets[0].effective
    sets[0].effective &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    _set(sets)
    try:
        yield
    finally:
        sets[0].effective = before
        _set(sets)


class ModesCount:
    """The same as a fault laid into a process, for the whole of its life."""

    def lay(self) -> None:
        """In this thread and those that it starts."""
        sets = _capabilities()
        sets[0].effective &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
        _set(sets)


def _capabilities() -> ctypes.Array[_Data]:
    sets = (_Data * 2)()
    _call("capget", sets)
    return sets


def _set(sets: ctypes.Array[_Data]) -> None:
    _call("capset", sets)


def _call(name: str, sets: ctypes.Array[_Data]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(sets)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
