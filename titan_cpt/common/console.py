"""The rich console that prints tables and messages."""

from __future__ import annotations

import sys

from rich.console import Console


def make_console() -> Console:
    """A console on standard output; 140 columns wide if that is not a terminal, so that tables fit."""
    return Console(width=None if sys.stdout.isatty() else 140)
