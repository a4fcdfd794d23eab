"""The rich console that prints tables and messages."""

from __future__ import annotations

import sys

from rich.console import Console

TEXT_COLUMNS = 80  # width of text that does not go to a terminal: log files, mails


def make_console(columns: int = 140) -> Console:
    """A console on standard output; `columns` wide if that is not a terminal. Wide tables need the default."""
    return Console(width=None if sys.stdout.isatty() else columns)
