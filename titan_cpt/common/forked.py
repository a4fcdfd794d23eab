"""Forked processes: they start in milliseconds and share what this process has loaded. Only a process that may fork."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Result = TypeVar("Result")

STARTS_THREADS = ("torch", "pyarrow", "datasets")  # libraries with threads of their own, which a fork does not copy


def may_fork() -> bool:
    """Whether this process has one thread, except idle ones of numpy; beside others a forked process could hang."""
    alone = threading.active_count() == 1 and not any(name in sys.modules for name in STARTS_THREADS)
    return alone and sys.platform == "linux"


def begin_forked(work: Callable[[], Result]) -> Callable[[], Result]:
    """Begin some work in a forked process if this process may fork; otherwise it is done when the result is needed.

    Args:
        work: returns or raises something that can be pickled.

    Returns:
        A function that waits for the work; it returns its result, or raises its exception.
    """
    if not may_fork():
        return work
    fork = multiprocessing.get_context("fork")
    receiving, sending = fork.Pipe(duplex=False)
    process = fork.Process(target=_do, args=(work, sending), daemon=True)
    process.start()
    sending.close()

    def result() -> Result:
        try:
            done, value = receiving.recv()
        except EOFError:  # the process was killed
            return work()
        finally:
            receiving.close()
            process.join()
        if not done:
            raise value
        return value  # type: ignore[no-any-return]

    return result


def _do(work: Callable[[], Any], sending: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        sending.send((True, work()))
    except Exception as fault:  # any: it is raised where the result is needed
        sending.send((False, fault))
