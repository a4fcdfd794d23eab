"""The Python API and a plugin's metric on two ranks, under torchrun and in a process group of the caller."""

import json
import os
import subprocess
import sys
from pathlib import Path

import plugin_package
import pytest
import training

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys
import torch.distributed as dist
import titan_cpt

config = titan_cpt.load_config("config.toml", {"job.name": sys.argv[1]})
if sys.argv[1] == "own":
    dist.init_process_group("gloo")
with titan_cpt.Trainer(config) as trainer:
    for step in trainer.steps():
        if step.run_step == 6 and os.environ.get("RANK", "1") == "1":
            trainer.stop()
    assert step.run_step == 6 and not trainer.finished
with titan_cpt.Trainer(config) as trainer:
    assert trainer.run()
assert dist.is_initialized() == (sys.argv[1] == "own")
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs of the script: in one process, on two ranks, and on two ranks in a group that the script initializes."""
    folder = tmp_path_factory.mktemp("library")
    raw = training.two_stages(training.write_languages(folder), folder)
    raw["validation"]["metrics"] = ["accuracy"]
    training.write_config(raw, folder / "config.toml")
    (folder / "script.py").write_text(SCRIPT)
    installed = plugin_package.install_example(folder / "plugin")
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in {"one": [], "two": torchrun, "own": torchrun}.items():
        command = [sys.executable, *launcher, "script.py", name]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


BAD_METRIC = """
def bad(context):
    if context.rank == 1:
        raise ValueError("no luck")
    if context.step:
        context.sum_over_ranks([1.0])
    return {"x": 1.0}
"""


def test_a_metric_that_raises_on_one_rank_is_an_event_or_ends_the_run_with_rank_and_reason(tmp_path):
    """An event if no rank waits for another (step 0); an error, before the collective times out, if one does."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["validation"]["metrics"] = ["bad"]
    raw["comm"] = {"train_timeout_seconds": 4}
    training.write_config(raw, tmp_path / "config.toml")
    site = plugin_package.register(tmp_path / "site", "bad", "1", {"titan_cpt.metrics": {"bad": "bad_metric:bad"}})
    (site / "bad_metric.py").write_text(BAD_METRIC)
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "titan_cpt", "train", "config.toml", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    failed = [line for line in lines(tmp_path / "run", "event") if line["name"] == "metric_failed"]

    assert done.returncode != 0
    assert "'bad' did not end on every rank: rank 1: ValueError: no luck" in done.stderr
    assert "metric bad failed: rank 1: ValueError: no luck" in done.stdout, "--quiet shows it"
    assert [(line["step"], line["why"]) for line in failed] == [(0, "rank 1: ValueError: no luck")]


def lines(folder, kind):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


@pytest.mark.parametrize("name", ["two", "own"])
def test_two_ranks_stop_together_resume_and_train_as_one_does(folders, name):
    """One rank requests the stop; batches are the same, and losses up to the order of sums."""
    one, two = (lines(folders / each, "train") for each in ("one", name))

    assert [line["batch_hash"] for line in two] == [line["batch_hash"] for line in one]
    losses = [line["loss_nats_per_token"] for line in one]
    assert [line["loss_nats_per_token"] for line in two] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("name", ["two", "own"])
def test_a_metric_over_two_ranks_counts_each_sequence_once(folders, name):
    """96 tokens are scored; one may flip between nearly equal logits."""
    one, two = (lines(folders / each, "metric") for each in ("one", name))

    assert [(line["step"], line["name"]) for line in two] == [(line["step"], line["name"]) for line in one]
    assert [line["value"] for line in two] == pytest.approx([line["value"] for line in one], abs=0.011)
