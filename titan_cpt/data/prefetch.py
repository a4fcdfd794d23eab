"""Prefetcher: a thread that fetches the windows of the next micro-batches from object storage into the local cache.

The data order is a function of the step, so the windows are known in advance. The thread only fills the cache: batches
are read in the training thread as always, and an error of storage is raised there too.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from titan_cpt.data.mixture import Draw
from titan_cpt.errors import DataError

_AHEAD_SEQUENCES = 256  # fetched before they are read


class _Fetcher(Protocol):
    def fetch(self, draws: Sequence[Draw]) -> None: ...


class Prefetcher:
    """Fetches micro-batches in order, some ahead of the one that is read.

    Args:
        reader: fetches the tokens of draws.
        draws_of: returns the draws of a micro-batch; called in the thread only.
        numbers: the micro-batches, in the order in which they are read.
    """

    def __init__(self, reader: _Fetcher, draws_of: Callable[[int], list[Draw]], numbers: range) -> None:
        self._position = _Position(numbers.start)
        # The thread does not refer to the prefetcher, so it ends when the loader is dropped, as after a rollback.
        weakref.finalize(self, self._position.stop)
        thread = threading.Thread(
            target=_fetch_all, args=(reader, draws_of, numbers, self._position), name="prefetch", daemon=True
        )
        thread.start()

    def advance(self, number: int) -> None:
        """Tell the thread that the micro-batches before `number` have been read."""
        self._position.advance(number)


class _Position:
    """The next micro-batch that training reads, shared with the thread."""

    def __init__(self, number: int) -> None:
        self._changed = threading.Condition()
        self._number = number
        self._stopped = False

    def advance(self, number: int) -> None:
        with self._changed:
            self._number = number
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def wait_until_near(self, number: int, ahead: int) -> bool:
        """Wait until at most `ahead` micro-batches are left before `number`; False if the loader was dropped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or number - self._number <= ahead)
            return not self._stopped

    def is_past(self, number: int) -> bool:
        with self._changed:
            return self._number > number


def _fetch_all(reader: _Fetcher, draws_of: Callable[[int], list[Draw]], numbers: range, position: _Position) -> None:
    for number in numbers:
        draws = draws_of(number)
        if not position.wait_until_near(number, max(2, _AHEAD_SEQUENCES // max(1, len(draws)))):
            return
        if position.is_past(number):
            continue
        try:
            reader.fetch(draws)
        except DataError:
            continue  # the training thread reads the same bytes, and reports it
