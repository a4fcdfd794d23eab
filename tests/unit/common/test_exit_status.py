"""Exit statuses, and the files in which run_train.sh reads the status and the messages of processes."""

import signal
import subprocess
import sys

import pytest

from titan_cpt.common.exit_status import (
    FAILURE,
    INTERRUPTED,
    STATUS_FILE_VARIABLE,
    STOPPED_EARLY,
    SUCCESS,
    USER_ERROR,
    exit_with,
    print_error,
)
from titan_cpt.errors import CheckpointError, ConfigError, NumericsError


@pytest.fixture
def status_file(tmp_path, monkeypatch):
    """The status file that run_train.sh names in the environment."""
    monkeypatch.setenv(STATUS_FILE_VARIABLE, str(tmp_path / "status"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    return tmp_path / "status"


def test_the_statuses_are_those_of_the_documentation():
    """Scripts and batch queues depend on these numbers."""
    assert (SUCCESS, FAILURE, USER_ERROR, STOPPED_EARLY, INTERRUPTED) == (0, 1, 2, 75, 130)
    assert (ConfigError.exit_status, CheckpointError.exit_status, NumericsError.exit_status) == (2, 2, 1)


@pytest.mark.parametrize(("statuses", "stored"), [([1], "1"), ([75], "75"), ([0], None), ([2, 1], "2"), ([1, 2], "2")])
def test_the_status_file_has_the_last_failure_and_prefers_a_user_error(status_file, statuses, stored):
    """torchrun stops the other ranks when one fails; their status does not replace that of a mistake."""
    for status in statuses:
        with pytest.raises(SystemExit) as left:
            exit_with(status)
        assert left.value.code == status

    assert (status_file.read_text() if status_file.exists() else None) == stored


def test_an_error_is_printed_and_stored_for_each_process(status_file, capsys):
    """A silent one is stored as an empty text: another rank prints the same message."""
    print_error("broken")
    first = (status_file.parent / "status.process-3").read_text()
    print_error("broken", silent=True)

    assert first == "broken\n"
    assert (status_file.parent / "status.process-3").read_text() == ""
    assert capsys.readouterr().err == "broken\n"


def test_an_interrupted_command_dies_of_sigint_with_one_line():
    """A shell then ends its own loop too."""
    program = "from titan_cpt.common.exit_status import exit_interrupted; exit_interrupted('3 of 4 done')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == -signal.SIGINT
    assert done.stderr == "stopped by Ctrl-C: 3 of 4 done\n"
