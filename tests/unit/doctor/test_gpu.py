"""torch's build against the driver, as nvidia-smi reports it: a program of that name on PATH is really run."""

import os

import pytest

from titan_cpt.common import gpus
from titan_cpt.doctor import gpu
from titan_cpt.doctor.request import Request

SMI = "| NVIDIA-SMI {0}    Driver Version: {0}    CUDA Version: 12.4 |"


@pytest.fixture(autouse=True)
def no_driver(monkeypatch, tmp_path):
    """Neither a kernel module nor a device file, so that tests pass on a machine with a GPU."""
    monkeypatch.setattr(gpus, "NVIDIA_DRIVER_FILE", tmp_path / "none")
    monkeypatch.setattr(gpu, "_DEVICE_FILE", tmp_path / "none")


@pytest.fixture
def fake_smi(monkeypatch, tmp_path):
    """fake_smi(script): a shell script named nvidia-smi, first on PATH."""

    def fake_smi(script):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return fake_smi


@pytest.mark.parametrize(
    ("cuda", "driver", "level", "says", "remedy"),
    [
        ("13.0", "580.65.06", "ok", "new enough for CUDA 13.0", ""),
        ("13.0", "550.54.15", "problem", "too old for CUDA 13.0, which needs 580", "whl/cu126"),
        ("12.6", "550.54.15", "ok", "new enough", ""),
        ("12.6", "470.82.01", "problem", "too old for CUDA 12.6, which needs 525", "whl/cpu"),
        (None, "580.65.06", "problem", "built for CPUs only", "whl/cu130"),
        (None, "550.54.15", "problem", "built for CPUs only", "whl/cu126"),
    ],
)
def test_the_build_is_compared_with_the_driver(cuda, driver, level, says, remedy):
    (found,) = gpu.driver_findings(cuda, None, SMI.format(driver))
    assert found.level == level
    assert says in found.text
    assert remedy in found.remedy


def test_without_a_driver_a_cuda_build_is_a_note_and_a_cpu_build_is_fine():
    (cuda,) = gpu.driver_findings("13.0", None, "")
    (cpu,) = gpu.driver_findings(None, None, "")
    assert (cuda.level, cpu.level) == ("note", "ok")
    assert "it runs on the CPU" in cuda.text


def test_what_a_failing_nvidia_smi_says_is_the_problem(fake_smi):
    fake_smi("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    (found,) = gpu.driver_findings("13.0", None, gpu.smi())
    assert found.level == "problem"
    assert "Driver/library version mismatch" in found.text
    assert "reboot" in found.remedy


def test_a_driver_that_nvidia_smi_reports_is_found(fake_smi):
    fake_smi(f"echo '{SMI.format('535.104.05')}'")
    found = list(gpu.check_torch(Request()))
    assert found[0].level == "ok"
    assert "535.104.05" in found[1].text


def test_an_nvidia_smi_that_hangs_is_a_problem(fake_smi, monkeypatch):
    monkeypatch.setattr(gpu, "_SMI_TIMEOUT_S", 0.5)
    fake_smi("exec sleep 60")
    (found,) = gpu.driver_findings("13.0", None, gpu.smi())
    assert "no answer within 0.5 s" in found.text


def test_the_kernel_module_tells_the_release_in_a_container_without_nvidia_smi(tmp_path):
    (tmp_path / "none").write_text("550.54.15\n")
    (found,) = gpu.driver_findings("13.0", None, "")
    assert "550.54.15 is too old" in found.text


def test_precisions_follow_the_compute_capability():
    assert [gpu.precisions(each) for each in ((7, 5), (8, 0), (8, 9), (9, 0))] == [
        "no bf16, no float8",
        "bf16, no float8",
        "bf16, float8",
        "bf16, float8",
    ]


def test_other_processes_are_listed_with_their_memory():
    listed = "4242, /usr/bin/python3, 70000 MiB\n[N/A], x, y\nNo running processes found\n"
    assert gpu.other_processes(listed) == ["python3 (4242, 70000 MiB)"]
    assert gpu.other_processes("") == []
