"""Stages that sweep runs share: which ones are equal, and that they are trained once and linked."""

import os
import signal
import subprocess
import sys

import pytest
import training
from sweeps import FRACTION, stages_trained_in

from titan_cpt.errors import CheckpointError
from titan_cpt.runs import sweep
from titan_cpt.runs.shared_stages import SharedStageLock, adopt_shared_stages, count_shared_stages
from titan_cpt.runs.sweep_runs import read_sweep_runs
from titan_cpt.runs.training_process import StopSignals

pytestmark = training.THEIR_WARNINGS_IGNORED


def shared_counts(runs):
    return [count_shared_stages(run, runs) for run in runs]


def test_runs_share_the_stages_before_the_first_difference(swept):
    """English if German's replay is swept; none if the seed is."""
    assert shared_counts(read_sweep_runs([swept({FRACTION: [0.0, 0.25]})])) == [1, 1]
    assert shared_counts(read_sweep_runs([swept({"job.seed": [0, 1]})])) == [0, 0]


def test_runs_with_different_validation_share_nothing(swept):
    """The other run's losses would not be those that this run would have measured."""
    assert shared_counts(read_sweep_runs([swept({"validation.sequences": [6, 7]})])) == [0, 0]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("training.local_batch_size", [2, 4]),
        ("training.on_loss_spike", ["log", "skip"]),
        ("compile.enable", [False, True]),
        ("activation_checkpoint.mode", ["none", "full"]),
    ],
)
def test_runs_with_different_numerics_share_nothing(swept, key, values):
    """These keys are not part of the recipe, and a sweep over them compares their results."""
    assert shared_counts(read_sweep_runs([swept({key: values})])) == [0, 0]


def test_runs_with_different_averages_share_nothing(swept):
    """Training is the same, but the checkpoint holds another average; where that is kept does not matter."""
    kinds = read_sweep_runs([swept({"averaging.kind": ["mean", "ema"]})])
    places = read_sweep_runs([swept({"averaging.kind": ["mean"], "averaging.keep_on": ["host", "device"]})])

    assert shared_counts(kinds) == [0, 0]
    assert shared_counts(places) == [2, 2]


def test_runs_with_different_loader_workers_share_all_stages(swept):
    """The number of workers changes no result."""
    assert shared_counts(read_sweep_runs([swept({"training.num_workers": [0, 1]})])) == [2, 2]


def test_runs_share_the_stages_before_the_first_on_other_data(swept, tmp_path):
    """The recipe does not contain file names: English is shared if German's files are swept, nothing if its own are."""
    other = str(training.write_tokens(tmp_path / "other", language=2, tokens=4000, seed=5))
    german = read_sweep_runs([swept({"datasets.de.train": [str(tmp_path / "de"), other]})])
    english = read_sweep_runs([swept({"datasets.en.train": [str(tmp_path / "en"), other]})])

    assert shared_counts(german) == [1, 1]
    assert shared_counts(english) == [0, 0]


def test_two_runs_at_once_train_the_shared_stage_once(swept, tmp_path):
    """As two tasks of an array: the second run waits for the first one's English, and links it."""
    path = swept({FRACTION: [0.0, 0.25]})
    command = [sys.executable, "-m", "titan_cpt", "sweep", str(path), "--arm"]
    both = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(2)]
    outputs = [process.communicate(timeout=180)[0] for process in both]
    folders = [tmp_path / "out" / "run" / f"fraction-{value}" for value in ("0", "0.25")]

    assert [process.returncode for process in both] == [0, 0]
    assert sorted(map(stages_trained_in, folders), key=len) == [["german"], ["english", "german"]]
    assert sum("adopted english" in output for output in outputs) == 1


def test_a_signal_ends_the_wait_for_the_lock(swept):
    """A run that waits for the shared stages exits with 75 and has written nothing."""
    path = swept({FRACTION: [0.0, 0.25]})
    first, second = read_sweep_runs([path])
    command = [sys.executable, "-m", "titan_cpt", "sweep", str(path), "--arm", "1", "--launch", "true"]
    with StopSignals() as stop, SharedStageLock(first, [first, second], stop, log=lambda _: None):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)

    assert f"waiting for the run that trains the shared stages (process {os.getpid()} on host" in lines[1]
    assert process.returncode == 75
    assert not second.folder.exists()


def test_the_lock_is_released_when_the_last_shared_stage_has_its_checkpoint(swept):
    """Before that it stays; a second run can then take it although the first one still trains."""
    runs = read_sweep_runs([swept({FRACTION: [0.0, 0.25]})])
    can_lock = [
        sys.executable,
        "-c",
        "import sys; from pathlib import Path; from titan_cpt.common.file_lock import FileLock\n"
        "sys.exit(not FileLock(Path(sys.argv[1])).acquire())",
    ]
    with StopSignals() as stop, SharedStageLock(runs[0], runs, stop, log=print) as lock:
        (path,) = runs[0].folder.parent.glob(".shared-*.lock")
        lock.release_when_trained()
        before = subprocess.run([*can_lock, str(path)], check=False).returncode
        runs[0].checkpoint(0).mkdir(parents=True)
        (runs[0].checkpoint(0) / "manifest.json").write_text("{}")
        lock.release_when_trained()
        after = subprocess.run([*can_lock, str(path)], check=False).returncode

    assert (before, after) == (1, 0)


def test_a_damaged_checkpoint_is_not_linked(swept):
    """The run fails with the file's name and does not start from other weights."""
    path = swept({FRACTION: [0.0, 0.25]})
    sweep.train_sweep_runs([path], (), only=0, train=False, log=lambda _: None)
    assert training.train(read_sweep_runs([path])[0].folder / "arm.toml").status == 0
    first, second = read_sweep_runs([path])
    files = (first.folder / "english" / "step-00000012").rglob("*")
    victim = max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)

    with pytest.raises(CheckpointError, match="its content changed since it was saved"):
        adopt_shared_stages(second, [first, second])
    assert not list(second.folder.glob("*/step-00000012/manifest.json"))
