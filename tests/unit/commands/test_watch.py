"""`titan-cpt watch`: a snapshot in a pipe, a live view on a terminal that Ctrl-C leaves quietly."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest

from unit.reporting.conftest import write_run  # noqa: F401 # a fixture
from unit.reporting.run_folders import EN_DE, status_of


def test_a_pipe_gets_a_snapshot(write_run, capsys):  # noqa: F811
    """Within 80 columns."""
    folder = write_run("one", EN_DE)

    assert status_of("watch", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("one  failed")
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("en ") and line.endswith("+1.0000") for line in lines)


@pytest.mark.parametrize("words", [["nowhere"], ["nowhere", "--once"]])
def test_a_run_that_does_not_exist_is_a_mistake(tmp_path, capsys, words, monkeypatch):
    """The message says how to wait for it."""
    monkeypatch.chdir(tmp_path)

    assert status_of("watch", *words) == 2
    assert capsys.readouterr().err == (
        "DataError: nowhere: no such file or folder. Give a run folder, such as outputs/quickstart. --wait waits for a "
        "run that begins later\n"
    )


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "soon"])
def test_an_interval_is_a_number_of_seconds(tmp_path, capsys, interval):
    """At least a tenth."""
    assert status_of("watch", tmp_path, "--interval", interval) == 2
    assert "must be a number of seconds from 0.1" in capsys.readouterr().err


def test_a_terminal_shows_a_run_that_begins_until_ctrl_c(write_run, tmp_path):  # noqa: F811
    """It waits for the run, shows it, and leaves the last picture and status 0, without a traceback."""
    source = write_run("source", EN_DE)
    run = tmp_path / "later"
    terminal, other_end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-m", "titan_cpt", "watch", str(run), "--wait", "--interval", "0.1"]
    with subprocess.Popen(command, stdin=other_end, stdout=other_end, stderr=other_end, env=environment) as watching:
        os.close(other_end)
        text = _read_until(terminal, "waiting for")
        shutil.copytree(source, run)
        text += _read_until(terminal, "+1.0000")
        watching.send_signal(signal.SIGINT)
        text += _read_until(terminal, None)
    os.close(terminal)

    assert watching.returncode == 0
    assert "Traceback" not in text
    assert text.rindex("source  failed") > text.rindex("\x1b[?1049l")


def _read_until(terminal, word, seconds=30):
    """What the terminal shows until a word appears, or until the program ends."""
    text = ""
    end = time.monotonic() + seconds
    while (word is None or word not in text) and time.monotonic() < end:
        try:
            text += os.read(terminal, 65536).decode(errors="replace")
        except OSError:
            break
    return text
