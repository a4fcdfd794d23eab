"""Data of two languages, and an undisturbed run of the real command to compare others with."""

import os
import shutil
import subprocess
import sys

import pytest
import training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two languages, in documents of 30 to 90 tokens."""
    return training.write_languages(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """An undisturbed run of the real command, in its own interpreter."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = training.write_config(training.two_stages(data, folder), folder / "c.toml")
    command = [sys.executable, "-m", "titan_cpt", "train", "--config", str(config)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder / "run"


@pytest.fixture
def raw(data, tmp_path):
    """The same run, to be disturbed."""
    return training.two_stages(data, tmp_path)


@pytest.fixture
def config(raw, tmp_path):
    """Its file."""
    return training.write_config(raw, tmp_path / "c.toml")


@pytest.fixture
def ended(unbroken, config, tmp_path):
    """A copy of the finished run in this test's own folder."""
    shutil.copytree(unbroken, tmp_path / "run")
    return tmp_path / "run"
