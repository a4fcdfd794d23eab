"""Runs of the real command on a GPU: losses near a CPU's, saves, resume after kill -9, and the options for CUDA."""

import os
import subprocess
import sys

import pytest
import torch
import training

from titan_cpt.checkpoint import manifest

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # CUDA's libraries warn of their own settings

BF16 = {"training": {"mixed_precision_param": "bfloat16"}}
DETERMINISTIC = {"job": {"deterministic": True}}
COMPILED = {"compile": {"enable": True}}
# Overrides, and those of the run with which it is compared.
OPTIONS = {
    "AdamW in Triton": ({"optimizer": {"implementation": "triton"}}, {}),
    "AdamW in Triton, compiled": ({"optimizer": {"implementation": "triton"}}, COMPILED),
    "CUDA graphs": ({"training": {"cuda_graphs": True}}, {}),
    "CUDA graphs, compiled": ({"training": {"cuda_graphs": True}}, COMPILED),
    "the whole model compiled": ({"compile": {"scope": "model"}}, COMPILED),
    "attention by cuDNN": ({"training": {"attention_backend": "cudnn"}}, {}),
    "attention by flash": ({"training": {"attention_backend": "flash"}}, {}),
    "attention by the efficient kernel": ({"training": {"attention_backend": "efficient"}}, {}),
    "attention by matrix products": ({"training": {"attention_backend": "math"}}, {}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tokens of two languages."""
    return training.write_languages(tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def run(data, tmp_path):
    """run(name, tables...): train two stages to their end on the GPU; returns the run's folder."""

    def run(name, *tables, **faults):
        outcome = training.train(config(data, tmp_path / name, *tables), **faults)
        assert faults or outcome.status == 0, outcome.output
        return tmp_path / name / "run"

    return run


def config(data, out, *tables):
    """The config file of a run; later tables take precedence."""
    raw = training.two_stages(data, out)
    for table in tables:
        raw = training.changed(raw, **table)
    return training.write_config(raw, out / "config.toml")


def largest_difference(one, other):
    """Of the losses of two runs, in nats per token."""
    first, second = training.numbers_of(one), training.numbers_of(other)
    assert first.keys() == second.keys()
    return max(abs(first[key][0] - second[key][0]) for key in first)


def test_float32_has_the_losses_of_a_cpu(run, data, tmp_path):
    """After 22 steps and a transition; the same command in a process that sees no GPU."""
    on_gpu = run("gpu")
    file = config(data, tmp_path / "cpu")
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "titan_cpt", "train", "--config", file], env=hidden, check=True)
    (start,) = [line for line in training.lines_of(on_gpu, "event") if line["name"] == "start"]

    assert start["versions"]["on"] == torch.cuda.get_device_name()
    assert largest_difference(on_gpu, tmp_path / "cpu" / "run") < 1e-3


def test_bfloat16_stays_near_float32(run):
    """The learning rate and the batches are the same; the losses differ by rounding."""
    assert largest_difference(run("bf16", BF16), run("float32")) < 0.05


def test_a_run_saves_more_than_twice_in_the_background_and_every_checkpoint_is_whole(run):
    """torch 2.11 closes its stager after each save: the second one failed."""
    folder = run("saves", BF16)
    events = [line["name"] for line in training.lines_of(folder, "event")]
    kept = sorted(path.parent for path in folder.rglob("manifest.json"))

    assert events.count("checkpoint") >= 5
    assert "save_failed" not in events
    assert len(kept) >= 3
    for checkpoint in kept:
        assert manifest.verify(checkpoint)["files"]


def test_a_killed_run_resumes_to_the_same_bits(run, data, tmp_path):
    """kill -9 in the tenth step, with a save of the eighth on its way to the disk."""
    unbroken = run("unbroken", BF16, DETERMINISTIC)
    killed = run("killed", BF16, DETERMINISTIC, fault=training.Fault("titan_cpt.train:Trainer.train_step", 10))
    assert len(training.numbers_of(killed)) < len(training.numbers_of(unbroken))
    run("killed", BF16, DETERMINISTIC)

    assert training.numbers_of(killed) == training.numbers_of(unbroken)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_for_cuda_changes_losses_by_rounding_only(run, name):
    """Against the same run without it."""
    option, alike = OPTIONS[name]

    assert largest_difference(run("with", BF16, alike, option), run("without", BF16, alike)) < 0.02


@pytest.mark.parametrize(
    "name", ["AdamW in Triton", "CUDA graphs", "CUDA graphs, compiled", "the whole model compiled"]
)
def test_a_killed_run_with_an_option_for_cuda_resumes_to_the_same_bits(run, name):
    """kill -9 in the second stage."""
    option, alike = OPTIONS[name]
    tables = (BF16, DETERMINISTIC, alike, option)
    unbroken = run("unbroken", *tables)
    killed = run("killed", *tables, fault=training.Fault("titan_cpt.train:Trainer.train_step", 17))
    run("killed", *tables)

    assert training.numbers_of(killed) == training.numbers_of(unbroken)


def test_cuda_graphs_give_the_bits_of_the_eager_step(run):
    """A replay launches the kernels of the step that was captured.

    Both runs have AdamW in Triton: torch's reads the LR as float64 in an eager step and as float32 in a graph.
    """
    tables = (BF16, DETERMINISTIC, {"optimizer": {"implementation": "triton"}})
    graphs = {"training": {"cuda_graphs": True}}

    with_graphs, without = (run(name, *tables, table) for name, table in (("g", graphs), ("e", {})))

    assert training.numbers_of(with_graphs) == training.numbers_of(without)
