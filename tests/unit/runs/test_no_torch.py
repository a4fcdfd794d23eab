"""The commands that plan runs, and prepare them, start without importing torch."""

import subprocess
import sys

import training
from sweeps import FRACTION

pytestmark = training.THEIR_WARNINGS_IGNORED

_RUN = """
import sys
from titan_cpt.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def run_without_torch(*words):
    """Run the command in a process of its own, which fails if torch is imported; its output."""
    command = [sys.executable, "-c", _RUN, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sweep_is_planned_and_prepared_without_torch(swept):
    """--plan and --prepare-only."""
    path = swept({FRACTION: [0.0, 0.25]})

    assert "fraction-0.25" in run_without_torch("sweep", path, "--plan")
    assert "ready:" in run_without_torch("sweep", path, "--prepare-only")


def test_a_plan_and_baselines_are_made_without_torch(tmp_path):
    """plan for people and for programs; baselines writes its configs."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path / "out")
    path = training.write_config(raw, tmp_path / "c.toml")

    assert "english" in run_without_torch("plan", "--config", path)
    assert '"fingerprint"' in run_without_torch("plan", "--config", path, "--json")
    assert "union.toml" in run_without_torch("baselines", "--config", path)


def test_a_branch_is_made_without_torch(tmp_path):
    """The annealing from a trained checkpoint; the training that follows loads torch."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path / "out")
    raw["stages"] = raw["stages"][:1]
    assert training.train(training.write_config(raw, tmp_path / "c.toml")).status == 0
    checkpoint = tmp_path / "out" / "run" / "english" / "step-00000009"

    assert "created; to train it: ./run_train.sh" in run_without_torch(
        "anneal", checkpoint, "--tokens", "128", "--prepare-only"
    )
