"""A small crash matrix: after thirty kills at seeded moments every number and tensor is that of an unbroken run."""

import subprocess
import sys
from pathlib import Path

import faulty
import pytest
import training
from crashes import MOMENTS, Matrix, small_run

pytestmark = training.THEIR_WARNINGS_IGNORED


def test_thirty_kills_change_nothing(tmp_path):
    """Kills in steps, saves, transitions, validation, skips and starts; scripts/crash_matrix.py runs longer."""
    toll = Matrix(tmp_path, seed=20).run_until(30)

    assert toll.mismatches == []
    assert toll.damaged == []
    assert toll.total >= 30
    assert toll.resumes >= 5  # on a busy machine more kills come before the first checkpoint
    assert len(toll.kills) >= 9, "the seed must hit most kinds of moment"


def test_killing_one_of_two_ranks_changes_nothing(tmp_path):
    """The other one ends by itself, or hangs and is killed; then both are started again."""
    toll = Matrix(tmp_path, seed=3, ranks=2).run_until(4)

    assert toll.mismatches == []
    assert toll.damaged == []
    assert toll.total >= 4


def test_two_ranks_share_the_files_to_verify_and_both_fall_back_from_a_damaged_one(tmp_path):
    """Each of the four files of the newest checkpoint is damaged in turn, whichever rank looks at it."""
    raw = training.changed(small_run(tmp_path), training={"on_nonfinite": "stop"})
    raw["stages"] = raw["stages"][:1]
    config = training.write_config(raw, tmp_path / "run.toml")
    run = tmp_path / raw["job"]["name"]

    assert faulty.train(config, ranks=2).status == 0
    files = sorted((run / "english" / "step-00000008").glob("rank-*"))
    sound = {file: file.read_bytes() for file in files}
    for file in files:
        file.write_bytes(sound[file][:-1] + bytes([sound[file][-1] ^ 1]))
        ended = faulty.launch(config, ranks=2)

        assert [one.status for one in ended] == [0, 0], ended[0].output
        assert f"skipping damaged checkpoint: {file}: its content changed" in " ".join(ended[0].output.split())
        assert [event["step"] for event in training.events_of(run, "resume")][-1] == 6
    assert len(files) == 4


@pytest.mark.parametrize("moment", [name for name, places in MOMENTS.items() if places])
def test_every_moment_of_the_matrix_can_be_hit(tmp_path, moment):
    """A kill is tied to a function by its name: if that is renamed, the kill never happens."""
    matrix = Matrix(tmp_path, seed=1)
    matrix.rng.choice = lambda among: moment if moment in among else among[0]
    matrix.rng.randint = lambda low, high: low
    toll = matrix.run_until(1)

    assert toll.kills == {moment: 1}
    assert toll.mismatches == []


def test_the_script_prints_kills_resumes_and_mismatches():
    """Two kills, and no checkpoint damaged by them; the summary has each count."""
    script = Path(__file__).parents[2] / "scripts" / "crash_matrix.py"
    command = [sys.executable, script, "--kills", "2", "--seed", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills 2, resumes " in done.stdout
    assert "damaged 0, mismatches 0" in done.stdout
