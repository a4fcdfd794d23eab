"""Training a sweep: failed, finished and stopped runs, one run of a Slurm array, and shared stages."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training
from sweeps import FRACTION, stages_trained_in, status_of

from titan_cpt.cli import main

pytestmark = training.THEIR_WARNINGS_IGNORED


def test_a_task_of_a_slurm_array_prepares_its_own_run(swept, monkeypatch, capsys, tmp_path):
    """SLURM_ARRAY_TASK_ID is the number of the run; a number beyond the last is refused."""
    path = swept({FRACTION: [0.0, 0.25]})
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")

    assert status_of("sweep", path, "--prepare-only") == 0
    ready = tmp_path / "out" / "run" / "fraction-0.25" / "arm.toml"
    assert f"ready: {ready}" in capsys.readouterr().out
    assert not (tmp_path / "out" / "run" / "fraction-0").exists()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert status_of("sweep", path) == 2
    assert "--index: must be from 0 to 1, got 2" in capsys.readouterr().err


def test_a_launch_command_that_does_not_exist_fails_the_run(swept, capsys):
    """The message names the command; exit status 1, as for any failed run."""
    assert status_of("sweep", swept({FRACTION: [0.0]}), "--launch", "/nowhere/run.sh") == 1
    assert "--launch: /nowhere/run.sh cannot be run" in " ".join(capsys.readouterr().out.split())


def test_a_sweep_trains_the_shared_stage_once_and_every_run_as_if_by_itself(swept, tmp_path, capsys):
    """Three runs, the second invalid: it is reported and the third is trained; English is trained by the first.

    The third run's metrics and weights are bit for bit those of the same config trained as a single run. The second
    time, nothing is trained.
    """
    path = swept({FRACTION: [0.0, 1.25, 0.25]})
    status = status_of("sweep", path)
    shown = capsys.readouterr().out
    first, third = (tmp_path / "out" / "run" / f"fraction-{value}" for value in ("0", "0.25"))
    raw = training.two_stages(tmp_path, tmp_path / "alone")
    alone = training.train(training.write_config(raw, tmp_path / "alone.toml"))
    again = status_of("sweep", path)

    assert (status, alone.status, again) == (1, 0, 1)
    assert (stages_trained_in(first), stages_trained_in(third)) == (["english", "german"], ["german"])
    assert "must be in [0, 1), got 1.25" in shown
    assert "adopted english from" in shown
    assert training.numbers_of(third) == training.numbers_of(tmp_path / "alone" / "run")
    last = Path("german") / "step-00000010"
    assert training.same_bits(training.tensors_of(third / last), training.tensors_of(tmp_path / "alone" / "run" / last))
    assert "english/step-00000009" in training.checkpoints_of(third)  # the pre-anneal point
    assert capsys.readouterr().out.count("already trained") == 2


def test_a_signal_stops_the_running_run_and_starts_no_other(swept, tmp_path):
    """Exit status 75 with a checkpoint saved, as for a single run; the second run is not started."""
    path = swept({"job.seed": [1, 2]}, stages=[training.third_stage() | {"steps": 5000}], datasets={})
    process = subprocess.Popen(
        [sys.executable, "-m", "titan_cpt", "sweep", str(path)], stdout=subprocess.PIPE, text=True
    )
    first = tmp_path / "out" / "run" / "seed-1"
    until = time.monotonic() + 120
    while not training.checkpoints_of(first):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=120)[0]

    assert process.returncode == 75, output
    assert training.events_of(first, "stop")
    assert not (tmp_path / "out" / "run" / "seed-2").exists()


def test_a_sweep_under_torchrun_is_refused(tmp_path, monkeypatch, capsys):
    """Each of its processes would train every run, in the same folders."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(SystemExit) as end:
        main(["sweep", str(tmp_path / "sweep.toml")])

    assert end.value.code == 2
    assert "--launch ./run_train.sh" in capsys.readouterr().err
