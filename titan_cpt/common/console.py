"""The rich consoles that print tables and messages."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, TextIO, cast

from rich.console import Console
from rich.control import Control

from titan_cpt.common.log_file import LogFile, TolerantStream

TEXT_COLUMNS = 80  # width of text that does not go to a terminal: log files, mails
TABLE_COLUMNS = 140  # width of tables there


class Verbosity(IntEnum):
    """How much is printed."""

    QUIET = 0
    """Errors, warnings and results of stages."""
    NORMAL = 1
    VERBOSE = 2
    """Also a line for each rank, timings, and the settings that are not defaults."""

    @classmethod
    def of(cls, *, quiet: bool, verbose: bool) -> Verbosity:
        """The verbosity of the options --quiet and --verbose."""
        return cls.QUIET if quiet else cls.VERBOSE if verbose else cls.NORMAL


def make_console(columns: int = TABLE_COLUMNS) -> Console:
    """A console on standard output; `columns` wide if that is not a terminal. Wide tables need the default."""
    return Console(width=None if sys.stdout.isatty() else columns)


class RunConsole(Console):
    """The console of a run: prints as much as `verbosity` allows, and logs it all, except what is only for VERBOSE.

    A terminal that was closed, or a pipe whose reader has ended, does not stop the run: the log continues.

    Args:
        shown: False on ranks whose messages rank 0 prints; they print and log nothing here.
        log: receives the same text, without colors and 80 columns wide.
        file: stdout by default.
        width: columns; by default those of the terminal, else 80.
    """

    def __init__(
        self,
        *,
        shown: bool = True,
        verbosity: Verbosity = Verbosity.NORMAL,
        log: LogFile | None = None,
        file: TextIO | None = None,
        width: int | None = None,
        **options: Any,
    ) -> None:
        stream = sys.stdout if file is None else file
        if not stream.isatty():
            width = width or TEXT_COLUMNS
        super().__init__(file=cast(TextIO, TolerantStream(stream)), width=width, **options)
        self.shown = shown
        self.verbosity = verbosity
        self._level = Verbosity.NORMAL
        self._one_thread = threading.RLock()  # trackers report from threads of their own
        self.log_file = log
        self._log_console: Console | None = None
        if log is not None:
            self._log_console = Console(file=cast(TextIO, _Lines(log)), width=TEXT_COLUMNS, color_system=None)
        self._hide()

    @contextmanager
    def level(self, level: Verbosity) -> Iterator[None]:
        """What is printed in the block is shown if the verbosity is `level` or more."""
        with self._one_thread:
            before, self._level = self._level, level
            self._hide()
            try:
                yield
            finally:
                self._level = before
                self._hide()

    def print(self, *objects: Any, **options: Any) -> None:
        """As `Console.print`; also to the log."""
        is_text = not any(isinstance(each, Control) for each in objects)  # a Control redraws the progress bar
        if self._log_console is not None and is_text and self._is_logged():
            self._log_console.print(*objects, **options)
        super().print(*objects, **options)

    def print_line(self, text: str) -> None:
        """Print text as it is. Off a terminal this takes a twentieth of the time of `print`."""
        if self.is_terminal:
            self.print(text, highlight=False, markup=False, soft_wrap=True)
            return
        if self.log_file is not None and self._is_logged():
            self.log_file.write(f"{text}\n")
        if not self.quiet:
            self.file.write(f"{text}\n")
            self.file.flush()

    @contextmanager
    def wide(self) -> Iterator[None]:
        """Off a terminal, and in the log, tables in the block may be as wide as those of `make_console`."""
        consoles: list[Console] = [] if self.is_terminal else [self]
        consoles += [] if self._log_console is None else [self._log_console]
        before = [console.width for console in consoles]
        for console in consoles:
            console.width = TABLE_COLUMNS
        try:
            yield
        finally:
            for console, width in zip(consoles, before, strict=True):
                console.width = width

    def _is_logged(self) -> bool:
        return self.shown and self._level <= max(Verbosity.NORMAL, self.verbosity)

    def _hide(self) -> None:
        self.quiet = not self.shown or self._level > self.verbosity


class _Lines:
    """A log as a text stream for rich."""

    encoding = "utf-8"

    def __init__(self, log: LogFile) -> None:
        self.write = log.write

    def flush(self) -> None:
        """The log writes every line at once."""

    def isatty(self) -> bool:
        return False
