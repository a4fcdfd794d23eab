"""Signals that request a stop: SIGTERM, SIGUSR1 and the first Ctrl-C. Does not import torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Turns SIGTERM, SIGUSR1 and the first SIGINT into a request that the training loop honours between two steps.

    SIGUSR1 is what Slurm is told to send before a time limit. A second SIGINT ends the process at once: checkpoints
    count only with their manifest, so that nothing is harmed.
    """

    def __init__(self) -> None:
        self.name = ""
        self._interrupting = False

    def __enter__(self) -> StopRequest:
        """Listen from here on."""
        self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within the block a signal raises KeyboardInterrupt at once: for work that has no steps to stop between."""
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.name = signal.Signals(number).name
        if self._interrupting:
            raise KeyboardInterrupt
