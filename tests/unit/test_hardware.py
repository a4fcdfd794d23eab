"""Tests of tests/hardware.py: no test sees a GPU, except those marked `gpu`, which run in processes that do."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import training

ROOT = Path(__file__).parents[2]
SEES = "import os, torch; print(torch.cuda.device_count(), repr(os.environ['CUDA_VISIBLE_DEVICES']))"
TESTS = """
import os
import platform
import pytest

@pytest.fixture
def cuda_device():
    return "stand-in: this machine needs no GPU for the test of the mechanism"

def visible():
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()

def test_unmarked():
    assert visible()[0] == ""

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(3))
def test_sees_them(number, record_property):
    assert visible()[0] == "1,0"
    with open("pids.txt", "a") as file:
        print(os.getpid(), file=file)

@pytest.mark.gpu
def test_fails():
    assert 2 + 2 == 5

@pytest.mark.gpu
def test_is_skipped():
    pytest.skip("a reason of its own")
"""


def pytest_on(folder, *options, **environment):
    """Run pytest on TESTS with this suite's conftest.py, on a machine that seems to have a GPU."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    (tools / "nvidia-smi").chmod(0o755)
    (folder / "test_some.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: needs a GPU\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TITAN_CPT_TESTS", "PYTEST"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-rfs", "-p", "no:cacheprovider", *options, "test_some.py"],
        cwd=folder,
        env={
            **kept,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{os.environ['PYTHONPATH']}",
            "PYTEST_ADDOPTS": "-p conftest",
            "CUDA_VISIBLE_DEVICES": "1,0",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_no_test_process_sees_a_gpu(tmp_path):
    """This process, a Python that it starts, and a run in a forked process; on any machine."""
    child = subprocess.run([sys.executable, "-c", SEES], cwd=tmp_path, capture_output=True, text=True, check=True)
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["stages"] = [{**raw["stages"][0], "steps": 1, "lr": {"schedule": "constant", "max": 1e-3}}]
    assert training.train(training.write_config(raw, tmp_path / "c.toml")).status == 0
    (start,) = [line for line in training.lines_of(tmp_path / "run", "event") if line["name"] == "start"]

    assert torch.cuda.device_count() == 0
    assert not torch.cuda.is_available()
    assert child.stdout.split() == ["0", "''"]
    assert start["versions"]["on"] == platform.machine()


def test_every_python_that_a_test_starts_finds_this_checkout(tmp_path):
    """From any folder, and whether or not the package is installed."""
    program = "import titan_cpt; print(titan_cpt.__path__[0])"
    child = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert Path(child.stdout.strip()) == ROOT / "titan_cpt"


def test_marked_tests_run_once_where_gpus_are_visible_and_are_reported_one_by_one(tmp_path):
    """In few processes, by whichever workers they were given to."""
    done = pytest_on(tmp_path, "-n", "2")

    assert "1 failed, 4 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "assert (2 + 2) == 5" in done.stdout
    assert "a reason of its own" in done.stdout
    assert len((tmp_path / "pids.txt").read_text().split()) == 3


def test_marked_tests_are_skipped_where_the_user_hides_the_gpus(tmp_path):
    """With the reason."""
    done = pytest_on(tmp_path, "-n", "0", CUDA_VISIBLE_DEVICES="")

    assert "1 passed, 5 skipped" in done.stdout, done.stdout + done.stderr
    assert "needs a GPU, which CUDA_VISIBLE_DEVICES='' hides" in done.stdout
