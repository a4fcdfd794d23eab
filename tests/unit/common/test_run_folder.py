"""One process at a time in a run's folder, and signals that ask it to stop."""

import errno
import fcntl
import os
import signal
from dataclasses import dataclass

import faulty
import pytest
import torch.distributed as dist
import training

from titan_cpt.common.run_folder import locked
from titan_cpt.common.signals import StopRequest
from titan_cpt.distributed.process_group import any_rank_stops
from titan_cpt.errors import CheckpointError


@pytest.fixture
def config(tmp_path):
    """A run that takes long enough to be met under way."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["stages"][0]["steps"] = 2000
    return training.write_config(training.changed(raw, checkpoint={"interval": 1000}), tmp_path / "c.toml")


def stop_at_once(process):
    process.send(signal.SIGKILL)
    return process.end()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone(config, tmp_path, workers):
    """Refused with 2 while it runs; after kill -9 the lock is free at once, also where a process that reads ahead for
    the killed one lives a few seconds longer."""
    run = tmp_path / "run"
    reading_ahead = () if workers == 0 else ("--training.num_workers", "1")
    first = training.Process(config, *reading_ahead)
    first.wait_for(lambda: bool(training.lines_of(run, "train")))
    written = (run / "config.toml").read_text()
    second = training.train(config, "--job.seed", "1")
    kept = (run / "config.toml").read_text()
    killed = stop_at_once(first)
    third = training.Process(config)
    third.wait_for(lambda: len(training.events_of(run, "start")) == 2)
    stop_at_once(third)

    assert second.status == 2
    assert f"{run}: another process is training here (process {first.pid} on host " in second.output
    assert "Traceback" not in second.output
    assert kept == written  # the refused one has touched nothing
    assert killed.status == -signal.SIGKILL


def test_the_lock_is_given_back_at_the_end_and_after_an_error(tmp_path):
    """Taken three times in one process, one after another; the folder is made."""
    folder = tmp_path / "deep" / "run"
    with locked(folder, rank=0):
        assert folder.is_dir()
    with pytest.raises(ZeroDivisionError), locked(folder, rank=0):
        _ = 1 / 0
    with locked(folder, rank=0):
        pass


def test_only_rank_0_takes_the_lock(tmp_path):
    """The others of the same run stand beside it."""
    with locked(tmp_path, rank=0), locked(tmp_path, rank=1), locked(tmp_path, rank=2):
        pass
    with locked(tmp_path / "nowhere", rank=1):
        pass

    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_told(tmp_path, where):
    """A regular file stands in the way of output_dir or is part of its path."""
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError, match=r"cannot be written: .*output_dir"), locked(tmp_path / where, rank=0):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_has_its_name(number):
    """Nothing is interrupted; before it, nobody asked."""
    with StopRequest() as stop:
        before = any_rank_stops(stop)
        os.kill(os.getpid(), number)

        assert not before
        assert any_rank_stops(stop)
        assert stop.name == number.name


def test_signals_go_back_to_whoever_had_them():
    """The handlers of before are there again, after an error too."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), StopRequest():
        _ = 1 / 0

    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_sigint_ends_the_process_at_once(tmp_path):
    """The first one asks; the second does not wait for the step that hangs."""
    pid = os.fork()
    if pid == 0:
        with StopRequest():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    _, status = os.waitpid(pid, 0)

    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT


def test_a_signal_while_the_ranks_agree_counts_from_the_next_time_on(monkeypatch):
    """The other ranks have answered by then: a rank that stopped alone would leave them waiting for ever."""
    all_reduce = dist.all_reduce

    def interrupted(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        all_reduce(*arguments, **keywords)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with StopRequest() as stop:
            monkeypatch.setattr(dist, "all_reduce", interrupted)
            first = any_rank_stops(stop)
            monkeypatch.setattr(dist, "all_reduce", all_reduce)
            second = any_rank_stops(stop)
    finally:
        dist.destroy_process_group()

    assert (first, second) == (False, True)
    assert stop.name == "SIGTERM"


@dataclass(frozen=True)
class NoLocks:
    """A file system that answers every request for a lock with an errno."""

    number: int

    def lay(self):
        """In the process of the run."""

        def lockf(*_):
            raise OSError(self.number, os.strerror(self.number))

        fcntl.lockf = lockf


def test_a_run_trains_on_a_file_system_without_locks(tmp_path):
    """Lustre without -o flock: a warning with the file's name, and the run comes to its end."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["stages"] = [{**raw["stages"][0], "steps": 2, "lr": {"schedule": "constant", "max": 1e-3}}]
    config = training.write_config(raw, tmp_path / "c.toml")
    outcome = faulty.train(config, faults=[NoLocks(errno.ENOSYS)])
    refused = faulty.train(config, "--job.name", "other", faults=[NoLocks(errno.EIO)])

    assert outcome.status == 0, outcome.output
    assert f"{tmp_path / 'run' / '.lock'}: this file system has no file locks" in outcome.output
    assert refused.status == 2
    assert f"AccessError: {tmp_path / 'other' / '.lock'}: cannot be locked: {os.strerror(errno.EIO)}" in refused.output
