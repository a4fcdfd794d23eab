"""The state of a run, as its folder shows it."""

import json
import os
import socket
import subprocess
import sys

import pytest

from titan_cpt.common.run_folder import checkpoint_folder, locked
from titan_cpt.reporting.run_state import run_state

STEPS = {"a": 10, "b": 20}


def state_of(folder, event=None, *, is_begun=True, last_write_s=0.0):
    return run_state(folder, STEPS, [event] if event else [], is_begun=is_begun, last_write_s=last_write_s)


def test_a_run_whose_lock_is_held_is_running(tmp_path):
    """The process, its host and the time are named; the lock is not touched."""
    code = (
        "import sys; from pathlib import Path; from titan_cpt.common.run_folder import locked\n"
        "with locked(Path(sys.argv[1]), rank=0): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        state, why = state_of(tmp_path)
        holder.stdin.close()
    after = state_of(tmp_path)

    assert state == "running"
    assert why.startswith(f"process {holder.pid} on host {socket.gethostname()}")
    assert after[0] == "failed"


def test_a_run_with_its_last_checkpoint_is_finished(tmp_path):
    """Also if an error was logged before."""
    last = checkpoint_folder(tmp_path, "b", 20)
    last.mkdir(parents=True)
    (last / "manifest.json").write_text("{}")

    assert state_of(tmp_path, {"name": "save_failed", "why": "disk full"}) == ("finished", "")


@pytest.mark.parametrize(
    ("event", "is_begun", "answer"),
    [
        (None, False, ("planned", "")),
        ({"name": "stop", "signal": "SIGTERM"}, True, ("stopped", "by SIGTERM")),
        ({"name": "stop", "why": "the loss is nan"}, True, ("failed", "the loss is nan")),
        ({"name": "save_failed", "why": "disk full"}, True, ("failed", "disk full")),
        ({"name": "checkpoint"}, True, ("failed", "ended without a record: killed or crashed")),
    ],
)
def test_the_last_event_tells_how_a_run_ended(tmp_path, event, is_begun, answer):
    """A run that was killed has none that does."""
    with locked(tmp_path, rank=0):
        pass

    assert state_of(tmp_path, event, is_begun=is_begun) == answer


def test_what_is_written_after_the_stop_does_not_change_the_state(tmp_path):
    """Uploads continue for a while after a signal; a later version may write events that this one does not know."""
    stop = {"name": "stop", "signal": "SIGTERM"}
    later = [{"name": "upload"}, {"name": "upload_failed", "why": "access denied"}, {"name": "unheard_of"}]

    def state_after(*events):
        return run_state(tmp_path, STEPS, events, is_begun=True, last_write_s=0.0)

    assert state_after({"name": "start"}, stop, *later) == ("stopped", "by SIGTERM")
    assert state_after(stop, *later, {"name": "start"}) == ("failed", "ended without a record: killed or crashed")


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("=== one\nlines\nDataError: pile.bin is cut short\n", "DataError: pile.bin is cut short"),
        (
            "=== one\nTraceback\n  x\ntorch.OutOfMemoryError: CUDA out of memory\n",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("=== one\nDataError: old\n=== two\nlines\n", "ended without a record: killed or crashed"),
    ],
)
def test_the_error_in_the_log_is_the_reason(tmp_path, log, why):
    """Of the last session only."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").write_text(log)

    assert state_of(tmp_path, {"name": "start"}) == ("failed", why)


def test_without_locks_a_fresh_run_with_a_holder_is_running(tmp_path, monkeypatch):
    """The lock file names a process; whether it lives on another host shows in the age of the metrics."""
    monkeypatch.setattr("titan_cpt.common.file_lock.fcntl.fcntl", _no_locks)
    holder = {"pid": 1, "host": "another", "slurm_job_id": None, "since": "2026-01-01 00:00:00 UTC"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    now = os.stat(tmp_path).st_mtime

    assert state_of(tmp_path, last_write_s=now)[0] == "running"
    assert state_of(tmp_path, last_write_s=now - 10_000)[0] == "failed"


def _no_locks(*_):
    raise OSError("no locks")
