"""The process that trains a sweep run: its exit status, its error message, and a command that does not exist."""

import sys

import pytest

from titan_cpt.errors import ConfigError
from titan_cpt.runs.training_process import StopSignals, last_error, train_in_process


def test_the_output_goes_into_the_console_file_and_the_exit_status_is_returned(tmp_path):
    """Both streams, appended."""
    console = tmp_path / "console.txt"
    console.write_text("before\n")
    script = "import sys; print('out', flush=True); print('err', file=sys.stderr); sys.exit(3)"
    polls = []
    with StopSignals() as stop:
        status = train_in_process([sys.executable, "-c", script], console, stop, on_poll=lambda: polls.append(1))

    assert status == 3
    assert console.read_text() == "before\nout\nerr\n"
    assert polls


def test_a_command_that_does_not_exist_is_an_error_with_its_name(tmp_path):
    """The sweep reports it as the run's error."""
    with StopSignals() as stop, pytest.raises(ConfigError, match=r"--launch: /nowhere/run\.sh cannot be run: No such"):
        train_in_process(["/nowhere/run.sh"], tmp_path / "console.txt", stop, on_poll=lambda: None)


def test_the_last_error_is_the_last_error_in_the_output(tmp_path):
    """With the lines that belong to it; the exit status if nothing was printed."""
    console = tmp_path / "console.txt"
    console.write_text("step 1\nConfigError: x.toml: 2 problems\n  - one\n  - two\n")
    with_error = last_error(console, 2)
    console.write_text("\n")

    assert with_error == "ConfigError: x.toml: 2 problems\n  - one\n  - two"
    assert last_error(console, 9) == "ended with status 9 and printed nothing"
