"""One training run in a process of its own: start it, pass a stop signal on to it, and find its error message."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from titan_cpt.errors import ConfigError

POLL_S = 0.5
_MESSAGE_LINES = 6


class StopRequested(Exception):
    """A stop signal arrived before the run was started."""


class StopSignals:
    """Records SIGTERM and SIGINT while a sweep trains, so that the running process can save a checkpoint and exit.

    Attributes:
        received: whether one of the signals arrived.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        self._before = {number: signal.signal(number, self._record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True


def train_in_process(command: Sequence[str], console: Path, stop: StopSignals, *, on_poll: Callable[[], None]) -> int:
    """Run a training command to its end and return its exit status.

    Args:
        console: file to which the command's output is appended.
        stop: as soon as it received a signal, the command gets a SIGTERM.
        on_poll: called every `POLL_S` seconds while the command runs.

    Raises:
        ConfigError: the command cannot be started.
    """
    with console.open("ab") as output:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise ConfigError(f"--launch: {command[0]} cannot be run: {error.strerror}") from None
        signalled = False
        while True:
            on_poll()
            if stop.received and not signalled:
                process.send_signal(signal.SIGTERM)  # a second SIGINT would end it without a checkpoint
                signalled = True
            try:
                return process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                continue


def last_error(console: Path, status: int) -> str:
    """The last error in the output of a failed command: from the last line that names an error class, or the last line.

    Args:
        console: file with the command's output.
        status: its exit status, for the message if there is no output.
    """
    lines = [line for line in console.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if re.match(r"\w*(Error|Exception)\b", line)]
    shown = lines[errors[-1] : errors[-1] + _MESSAGE_LINES] if errors else lines[-1:]
    return "\n".join(shown) or f"ended with status {status} and printed nothing"
