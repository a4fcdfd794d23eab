"""The log file of a process: what it prints, its warnings and its tracebacks, also when the terminal is gone.

The file is appended to; every session begins with a line of its own. Neither a full disk nor an unwritable folder ends
the program: what could not be written is counted, and the count is logged as soon as writing works again.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from titan_cpt.errors import TitanError

_TERMINAL_CODES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_])")
_LONGEST_UNFINISHED_LINE = 10_000  # characters kept of a line that has no end yet, such as a progress bar


class LogFile:
    """A log file that never raises an OSError.

    Attributes:
        trouble: why the last write failed; empty if it did not.

    Args:
        path: the file; its folder is created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        self._descriptor: int | None = None
        self._unfinished = ""
        self._lost_lines = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self.trouble = error.strerror or str(error)

    def write(self, text: str) -> None:
        """Append the finished lines of the text, without colors and without what a progress bar has overwritten."""
        *lines, rest = (self._unfinished + text).split("\n")
        self._unfinished = rest.rpartition("\r")[2][-_LONGEST_UNFINISHED_LINE:]
        if lines:
            self._append([_plain(line) for line in lines])

    def close(self) -> None:
        """Append a last line that has no end, and close the file."""
        if self._unfinished:
            self.write("\n")
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)

    def _append(self, lines: list[str]) -> None:
        if self._descriptor is None:
            return
        lost = [f"[{self._lost_lines} lines are missing here: {self.trouble}]"] if self._lost_lines else []
        left = "".join(f"{line}\n" for line in [*lost, *lines]).encode(errors="replace")
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
            self._lost_lines, self.trouble = 0, ""
        except OSError as error:
            self._lost_lines += len(lines)
            self.trouble = error.strerror or str(error)


@contextmanager
def log_output(path: Path, header: str) -> Iterator[tuple[LogFile, TextIO]]:
    """Within the block, what goes to stdout and stderr also goes to the log; an error that leaves the block does too.

    Output that the terminal does not take (it was closed, or the reader of a pipe ended) is dropped: the log has it.

    Args:
        header: the first line of this session.

    Yields:
        The log, and the stdout of before, for output that is logged in another form.
    """
    log = LogFile(path)
    if log.trouble:
        print(f"note: there is no log file: {path} cannot be written: {log.trouble}", file=sys.stderr)
    log.write(f"{header}\n")
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = tees = (
        cast(TextIO, TolerantStream(sys.stdout, log)),
        cast(TextIO, TolerantStream(sys.stderr, log)),
    )
    try:
        yield log, before[0]
    except TitanError as error:
        log.write(f"{type(error).__name__}: {error}\n")
        raise
    except BaseException:
        log.write(traceback.format_exc())
        raise
    finally:
        if (sys.stdout, sys.stderr) == tees:
            sys.stdout, sys.stderr = before
        log.close()


class TolerantStream:
    """A text stream whose writes do not fail when its terminal was closed or its reader has ended; else as it was.

    Args:
        log: receives the same text.
    """

    def __init__(self, stream: TextIO, log: LogFile | None = None) -> None:
        self._stream = stream
        self._log = log

    def write(self, text: str) -> int:
        """Write to the log and to the stream."""
        if self._log is not None:
            self._log.write(text)
        with self._tolerating():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream."""
        with self._tolerating():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Everything else is that of the stream."""
        return getattr(self._stream, name)

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with suppress(OSError, ValueError):  # what is still buffered must not fail at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _plain(line: str) -> str:
    return _TERMINAL_CODES.sub("", line.removesuffix("\r").rpartition("\r")[2])
