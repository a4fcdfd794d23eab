"""The console for tables and messages."""

import io
import sys

from titan_cpt.common.console import make_console


def test_output_that_is_not_a_terminal_is_140_columns_wide(monkeypatch):
    """A table in a file or a pipe keeps its columns."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())

    assert make_console().width == 140
