"""Locks between processes: the meaning of each errno, and the holder that a message names."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from titan_cpt.common.file_lock import FileLock, exclusive
from titan_cpt.errors import AccessError, DataError

HOLDING = """
import sys, time
from pathlib import Path
from titan_cpt.common.file_lock import FileLock
print(FileLock(Path(sys.argv[1])).acquire(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "lock")]
    environment = {**os.environ, "SLURM_JOB_ID": "4711"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def answering(number, monkeypatch):
    """From now on every lock request fails with an errno."""

    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_the_holder_is_identified_by_process_host_and_slurm_job(tmp_path, holder):
    """As the holder wrote it into the file; the kernel decides whether the lock is held."""
    lock = FileLock(tmp_path / "lock")

    assert not lock.acquire()
    assert lock.holder().startswith(f"process {holder.pid} on host {socket.gethostname()}, Slurm job 4711, since 20")


def test_after_kill_9_the_lock_is_free_and_the_old_text_is_ignored(tmp_path, holder, capsys):
    """The dead holder is not reported, and the text of the new holder replaces it."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = FileLock(tmp_path / "lock")

    assert str(holder.pid) in (tmp_path / "lock").read_text()
    assert lock.holder() == ""
    assert lock.acquire()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    lock.release()
    lock.close()
    assert (tmp_path / "lock").read_text() == ""
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"pid": "1"}', "4711", '{"pid": true, "host": "a", "slurm_job_id": null, "since": ""}'],
)
def test_a_damaged_lock_file_has_no_known_holder(tmp_path, text):
    """Lock files of older versions are empty; a text may be incomplete."""
    (tmp_path / "lock").write_text(text)

    assert FileLock(tmp_path / "lock").holder() == ""


def test_a_holder_on_another_host_is_reported(tmp_path):
    """Whether its process still exists cannot be checked from here."""
    holder = {"pid": 7, "host": "another.host", "slurm_job_id": None, "since": "2026-01-02 03:04:05 UTC"}
    (tmp_path / "lock").write_text(json.dumps(holder))

    assert FileLock(tmp_path / "lock").holder() == "process 7 on host another.host, since 2026-01-02 03:04:05 UTC"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_two_errnos_mean_that_another_process_has_the_lock(tmp_path, number, monkeypatch):
    """POSIX allows both."""
    answering(number, monkeypatch)

    with pytest.raises(DataError, match="taken"), exclusive(tmp_path / "lock", held=lambda by: DataError(f"taken{by}")):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, number, monkeypatch, capsys):
    """The work is done, and the user knows that no lock protects it."""
    answering(number, monkeypatch)

    with exclusive(tmp_path / "lock", held=lambda by: DataError("taken")):
        pass

    warning = capsys.readouterr().err
    assert f"{tmp_path / 'lock'}: this file system has no file locks ({os.strerror(number)})" in warning
    assert "started here" not in warning


def test_without_locks_the_warning_names_the_last_holder(tmp_path, monkeypatch):
    """The text of a process on another host, which it removes at a regular end."""
    answering(errno.ENOLCK, monkeypatch)
    holder = {"pid": 7, "host": "another.host", "slurm_job_id": "12", "since": "2026-01-02 03:04:05 UTC"}
    (tmp_path / "lock").write_text(json.dumps(holder))
    warnings = []

    assert FileLock(tmp_path / "lock", warn=warnings.append).acquire()
    assert "process 7 on host another.host, Slurm job 12, since 2026-01-02 03:04:05 UTC started here" in warnings[0]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EBADF])
def test_any_other_errno_is_an_error_that_names_the_file(tmp_path, number, monkeypatch):
    """The lock is neither held nor unsupported."""
    answering(number, monkeypatch)

    with pytest.raises(AccessError, match=rf"lock: cannot be locked: {os.strerror(number)}"):
        FileLock(tmp_path / "lock").acquire()
