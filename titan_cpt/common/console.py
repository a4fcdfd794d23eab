"""The console that tables and messages are printed to."""

from __future__ import annotations

import sys

from rich.console import Console


def make_console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 140)
