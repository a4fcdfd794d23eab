"""The log file of a process: what was printed, without colors; it survives the terminal and never stops the run."""

import errno
import os
import sys

import pytest

from titan_cpt.common.log_file import LogFile, log_output
from titan_cpt.errors import DataError

HEADER = "=== a session"


def test_output_and_tracebacks_are_in_the_log_and_on_the_terminal(tmp_path, capsys):
    """Of both streams, in their order; the streams are those of before afterwards."""
    path = tmp_path / "logs" / "rank-0.log"
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), log_output(path, HEADER):
        _print_and_fail()
    lines = path.read_text().splitlines()

    assert lines[:3] == [HEADER, "to stdout", "to stderr"]
    assert "Traceback" in lines[3]
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert capsys.readouterr().out == "to stdout\n"
    assert (sys.stdout, sys.stderr) == before


def _print_and_fail():
    print("to stdout")
    print("to stderr", file=sys.stderr)
    raise ZeroDivisionError("division by zero")


def test_an_expected_error_is_one_line(tmp_path):
    """As the command prints it."""
    path = tmp_path / "log"
    with pytest.raises(DataError), log_output(path, HEADER):
        raise DataError("pile.bin is cut short")

    assert path.read_text().splitlines() == [HEADER, "DataError: pile.bin is cut short"]


def test_sessions_are_appended(tmp_path):
    """Each with its header."""
    path = tmp_path / "log"
    for word in ("one", "two"):
        with log_output(path, f"=== {word}"):
            print(word)

    assert path.read_text().splitlines() == ["=== one", "one", "=== two", "two"]


def test_progress_bars_leave_their_last_state(tmp_path):
    """Colors and what was overwritten are dropped; a line that comes in parts is one line."""
    log = LogFile(tmp_path / "log")
    log.write("\x1b[1mbold\x1b[0m\n 10%|#   |\r")
    log.write(" 20%|##  |\r100%|####|\nun")
    log.write("finished")
    log.close()

    assert log.path.read_text().splitlines() == ["bold", "100%|####|", "unfinished"]


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path, capsys):
    """The block runs all the same."""
    (tmp_path / "logs").write_text("a file")
    with log_output(tmp_path / "logs" / "rank-0.log", HEADER) as (log, _):
        print("trained")
    out, err = capsys.readouterr()

    assert out == "trained\n"
    assert err.startswith("note: there is no log file: ")
    assert log.trouble


def test_a_full_disk_loses_lines_and_says_how_many(tmp_path, monkeypatch):
    """The next line that can be written follows a line that counts the lost ones."""
    log = LogFile(tmp_path / "log")
    log.write("one\n")
    write = os.write
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "write", full)
        log.write("two\nthree\n")
        trouble = log.trouble
    assert os.write is write
    log.write("four\n")

    assert trouble == "No space left on device"
    assert log.path.read_text().splitlines() == [
        "one",
        "[2 lines are missing here: No space left on device]",
        "four",
    ]
    assert log.trouble == ""


def test_a_closed_terminal_does_not_stop_the_run(tmp_path):
    """As after `| head` or a lost connection: the log has everything."""
    reader, writer = os.pipe()
    terminal = os.fdopen(writer, "w", buffering=1)
    os.close(reader)
    before, sys.stdout = sys.stdout, terminal
    try:
        with log_output(tmp_path / "log", HEADER):
            for number in range(3):
                print(number, flush=True)
    finally:
        sys.stdout = before
        terminal.close()

    assert (tmp_path / "log").read_text().splitlines() == [HEADER, "0", "1", "2"]
