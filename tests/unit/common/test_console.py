"""The consoles for tables, messages and runs."""

import io
import sys
from contextlib import suppress

from titan_cpt.common.console import RunConsole, Verbosity, make_console
from titan_cpt.common.log_file import LogFile


def test_output_that_is_not_a_terminal_is_140_columns_wide(monkeypatch):
    """A table in a file or a pipe keeps its columns."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())

    assert make_console().width == 140


def test_the_console_of_a_run_is_80_columns_wide_off_a_terminal(tmp_path):
    """Text is wrapped there; tables of results may be wider. The log has the same text."""
    log = LogFile(tmp_path / "log")
    out = io.StringIO()
    console = RunConsole(file=out, log=log)
    console.print("word " * 30)
    with console.wide():
        console.print("word " * 24)
    lines = out.getvalue().splitlines()

    assert [len(line.rstrip()) for line in lines] == [79, 69, 119]
    assert log.path.read_text().splitlines() == lines


def test_a_level_ends_with_its_block():
    """Also after an error."""
    out = io.StringIO()
    console = RunConsole(file=out, verbosity=Verbosity.QUIET)
    with suppress(ZeroDivisionError), console.level(Verbosity.QUIET):
        console.print_line("warned")
        raise ZeroDivisionError
    console.print_line("hidden")
    console.print("hidden")

    assert out.getvalue() == "warned\n"


def test_the_options_give_the_verbosity():
    """None of them is normal."""
    values = [Verbosity.of(quiet=quiet, verbose=verbose) for quiet, verbose in ((1, 0), (0, 0), (0, 1))]

    assert values == [Verbosity.QUIET, Verbosity.NORMAL, Verbosity.VERBOSE]
