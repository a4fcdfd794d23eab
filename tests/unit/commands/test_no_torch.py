"""Commands that only read files or plan start without torch, transformers and datasets: they answer at once."""

import subprocess
import sys

import pytest
import training

HEAVY = ("torch", "transformers", "datasets", "lm_eval")
PROGRAM = f"""
import sys
from titan_cpt.cli import main
try:
    main()
finally:
    print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, run folder) of a run of two stages that is trained to its end, with checkpoints and metrics."""
    folder = tmp_path_factory.mktemp("trained")
    raw = training.two_stages(training.write_languages(folder), folder)
    config = training.write_config(raw, folder / "c.toml")
    outcome = training.train(config)
    assert outcome.status == 0, outcome.output
    return config, folder / "run"


def heavy_imports(*words):
    """Which of HEAVY a command had imported when it ended; it must succeed."""
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stderr.splitlines()[-1].split()


@pytest.mark.parametrize("words", [(), ("report",), ("train",), ("eval",), ("generate",), ("export",)])
def test_help_imports_nothing_heavy(words):
    """Of the program and of each kind of command, those that compute included."""
    assert heavy_imports(*words, "--help") == []


@pytest.mark.parametrize(
    "options", [(), ("--json", "--batch", "german", "0"), ("--suggest", "--device-memory", "80GiB")]
)
def test_plan_imports_nothing_heavy(trained, options):
    """Of real token files, to the end of its tables."""
    assert heavy_imports("plan", "--config", trained[0], *options) == []


def test_report_imports_nothing_heavy(trained):
    """The tables of a run that was trained to its end."""
    assert heavy_imports("report", trained[1]) == []


def test_the_html_report_imports_nothing_heavy(trained, tmp_path):
    """The page and its figures; these need matplotlib, which needs no torch."""
    assert heavy_imports("report", trained[1], "--html", tmp_path / "page") == []
    assert (tmp_path / "page" / "index.html").exists()


def test_verify_imports_nothing_heavy(trained):
    """Checksums of a real checkpoint."""
    checkpoint = min((trained[1] / "german").glob("step-*"))

    assert heavy_imports("verify", checkpoint) == []


def test_checking_a_config_before_training_imports_nothing_heavy(trained):
    """What run_train.sh runs before it starts processes."""
    assert heavy_imports("train", "--config", trained[0], "--run-info") == []
