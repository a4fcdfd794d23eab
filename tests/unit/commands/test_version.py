"""`titan-cpt --version`: what it prints, also if torch is broken or cannot use the GPU."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titan_cpt.cli import main
from titan_cpt.common import gpus
from titan_cpt.common.version import own_version
from titan_cpt.doctor.versions import devices_of, driver_of

ROOT = Path(__file__).parents[3]


def printed(*folders):
    """The lines of `titan-cpt --version` in a process that finds modules in these folders first."""
    done = subprocess.run(
        [sys.executable, "-m", "titan_cpt", "--version"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT]))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_prints_titan_cpt_python_torch_and_the_devices(capsys):
    """One line each; the commit if titan_cpt is run from a checkout."""
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    first, second, third, *_, last = capsys.readouterr().out.splitlines()

    assert end.value.code == 0
    assert first.startswith(f"titan_cpt {own_version()}")
    assert ("(commit " in first) == (ROOT / ".git").exists()
    assert second == f"Python {platform.python_version()} ({sys.executable})"
    assert third.startswith(f"torch {torch.__version__}, for ")
    assert last.startswith("devices: ")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13: cannot open"),
        ("raise ModuleNotFoundError('No module named numbers_of_torch', name='numbers_of_torch')", "No module named"),
        ("", "AttributeError: module 'torch' has no attribute '__version__'"),
    ],
    ids=["a library is missing", "a module is missing", "an interrupted installation"],
)
def test_a_broken_torch_is_reported_after_the_version(tmp_path, source, message):
    """And not a traceback."""
    (tmp_path / "torch.py").write_text(source)
    lines = printed(tmp_path)

    assert lines[0].startswith("titan_cpt ")
    assert lines[1].startswith("Python ")
    assert lines[2].startswith("torch: cannot be imported: ")
    assert message in lines[2]
    assert len(lines) == 3


def test_a_missing_torch_is_reported_with_what_to_run(tmp_path):
    """As every other missing package."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")

    assert printed(tmp_path)[2].startswith("torch: not installed; install it: ")


def test_gpus_are_counted_by_name(monkeypatch):
    """A node may have two kinds."""
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", "NVIDIA L40S"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])

    assert devices_of(torch) == "2 x NVIDIA H100 80GB HBM3, 1 x NVIDIA L40S"


def test_an_old_driver_is_the_reason_for_no_gpu(monkeypatch):
    """torch only warns about it; training would silently use the CPU. The GPUs themselves are there."""

    def warn():
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old (found version 12040).\nUpdate it", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warn)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    found = devices_of(torch)

    assert found.startswith("CPU (")
    assert found.endswith("; no GPU: The NVIDIA driver on your system is too old (found version 12040).")


def test_the_driver_is_printed_with_the_newest_cuda_that_it_supports(monkeypatch, tmp_path):
    """Its release from the kernel module; 13000 is CUDA 13.0."""
    (tmp_path / "version").write_text("580.159.03\n")
    monkeypatch.setattr(gpus, "NVIDIA_DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)

    assert driver_of(torch) == "580.159.03, up to CUDA 13.0"
