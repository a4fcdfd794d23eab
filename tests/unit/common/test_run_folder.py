"""One process at a time trains in a run's folder; the names of its files and folders."""

import errno
import fcntl
import os
import signal
from dataclasses import dataclass

import faulty
import pytest
import training

from titan_cpt.common import run_folder
from titan_cpt.common.run_folder import checkpoint_folder, checkpoint_folders, locked
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
def test_a_second_run_in_the_folder_is_refused_until_the_first_has_ended(config, tmp_path, workers):
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


def test_the_lock_is_released_at_the_end_and_after_an_error(tmp_path):
    """One process takes it three times in a row; the folder is created."""
    folder = tmp_path / "deep" / "run"
    with locked(folder, rank=0):
        assert folder.is_dir()
    with pytest.raises(ZeroDivisionError), locked(folder, rank=0):
        _ = 1 / 0
    with locked(folder, rank=0):
        pass


def test_only_rank_0_takes_the_lock(tmp_path):
    """The other ranks of the run neither lock nor create the folder."""
    with locked(tmp_path, rank=0), locked(tmp_path, rank=1), locked(tmp_path, rank=2):
        pass
    with locked(tmp_path / "nowhere", rank=1):
        pass

    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be_created_is_refused(tmp_path, where):
    """A regular file has the name of the folder or of a part of its path."""
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError, match=r"cannot be written: .*output_dir"), locked(tmp_path / where, rank=0):
        pass


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
    """Lustre without -o flock: the run prints a warning with the name of the lock file, and finishes."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["stages"] = [{**raw["stages"][0], "steps": 2, "lr": {"schedule": "constant", "max": 1e-3}}]
    config = training.write_config(raw, tmp_path / "c.toml")
    outcome = faulty.train(config, faults=[NoLocks(errno.ENOSYS)])
    refused = faulty.train(config, "--job.name", "other", faults=[NoLocks(errno.EIO)])

    assert outcome.status == 0, outcome.output
    assert f"{tmp_path / 'run' / '.lock'}: this file system has no file locks" in outcome.output
    assert refused.status == 2
    assert f"AccessError: {tmp_path / 'other' / '.lock'}: cannot be locked: {os.strerror(errno.EIO)}" in refused.output


def test_the_paths_of_a_runs_folder(tmp_path):
    """Runs of older versions, scripts and users depend on these names."""
    names = (
        *(run_folder.CONFIG_FILE, run_folder.PLAN_FILE, run_folder.METRICS_FILE, run_folder.SUMMARY_FILE),
        *(run_folder.LOCK_FILE, run_folder.MANIFEST_FILE, run_folder.SKIPPED_FILE, run_folder.GENERATIONS_FILE),
    )

    assert names == (
        *("config.toml", "plan.json", "metrics.jsonl", "summary.json"),
        *(".lock", "manifest.json", "skipped.json", "generations.json"),
    )
    assert run_folder.RESERVED_STAGE_NAMES == ("tb", "evaluations", "profile", "report", "logs")
    assert (run_folder.INTERVAL, run_folder.STAGE_END, run_folder.PRE_ANNEAL) == ("interval", "stage_end", "pre_anneal")
    assert checkpoint_folder(tmp_path, "german", 500) == tmp_path / "german" / "step-00000500"


def test_checkpoint_folders_have_a_manifest(tmp_path):
    """Sorted by path; of all stages or of one; a folder without a manifest is an interrupted save."""
    for path in ("b/step-00000002", "a/step-00000010", "a/step-00000002"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "manifest.json").touch()
    (tmp_path / "a" / "step-00000020").mkdir()

    found = [path.relative_to(tmp_path).as_posix() for path in checkpoint_folders(tmp_path)]
    assert found == ["a/step-00000002", "a/step-00000010", "b/step-00000002"]
    assert checkpoint_folders(tmp_path, "b") == [tmp_path / "b" / "step-00000002"]
    assert checkpoint_folders(tmp_path / "none") == []
