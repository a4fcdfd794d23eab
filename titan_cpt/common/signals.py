"""Stopping on a signal: SIGTERM, SIGUSR1 or the first Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from titan_cpt.common.exit_status import STOPPED_EARLY
from titan_cpt.errors import TitanError

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StoppedError(TitanError):
    """A signal stopped a run before training, in work that the next run repeats."""

    exit_status = STOPPED_EARLY


class StopRequest:
    """Context manager that records SIGTERM, SIGUSR1 and the first SIGINT; the training loop then stops after a step.

    Slurm sends SIGUSR1 before the time limit of a job. A second SIGINT ends the process at once, which damages nothing:
    a checkpoint is valid only once its manifest is written. In a thread other than the main one, no signal is handled.

    Args:
        raises: a second SIGINT raises KeyboardInterrupt instead, for programs that call titan_cpt as a library.

    Attributes:
        name: name of the last signal received, such as "SIGTERM", or why else to stop; "" before the first.
    """

    def __init__(self, *, raises: bool = False) -> None:
        self.name = ""
        self._raises = raises
        self._interrupting = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        """Install the signal handlers."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within the block a signal raises KeyboardInterrupt, for work without steps such as data preparation."""
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Within the block a signal raises StoppedError, which `raise_on_all_ranks` raises on every rank."""
        try:
            with self.interrupting():
                yield
        except KeyboardInterrupt:
            raise StoppedError(f"stopped by {self.name} before training: the same command resumes") from None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            if self._raises:
                raise KeyboardInterrupt
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.name = signal.Signals(number).name
        if self._interrupting:
            raise KeyboardInterrupt
