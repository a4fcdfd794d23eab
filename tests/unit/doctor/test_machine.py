"""Checks of the machine, each with its problem: packages, CPU features, memory limits, ulimits, shared memory."""

import resource
import subprocess
import sys

import pytest

from titan_cpt.doctor import machine
from titan_cpt.doctor.request import Request


def by_topic(findings):
    return {finding.topic: finding for finding in findings}


def test_this_machine_has_a_python_and_packages_that_work():
    findings = [*machine.check_python(Request()), *machine.check_installation(Request())]
    assert {finding.level for finding in findings} <= {"ok", "note"}
    assert by_topic(findings)["python"].text.endswith(f"({sys.executable})")


def test_a_package_that_is_missing_or_too_old_is_a_problem_with_the_command(monkeypatch):
    needed = ["torch>=99", "no-such-package", "hf-only; extra == 'hf'", "numpy>=1"]
    monkeypatch.setattr(machine.metadata, "requires", lambda _: needed)
    problems = [finding for finding in machine.check_installation(Request()) if finding.level == "problem"]
    assert [finding.text.partition(" ")[0] for finding in problems] == ["torch", "no-such-package"]
    assert "needed is torch>=99" in problems[0].text
    assert "pip install" in problems[1].remedy


@pytest.mark.parametrize(
    ("version", "faults"), [("4.57.3", 1), ("5.0.0", 1), ("5.4.1", 1), ("5.5.0", 0), ("5.24.0", 0), ("6.0", 0)]
)
def test_versions_that_are_known_to_be_wrong_are_named(version, faults):
    """transformers before 5, and 5.0 to 5.4, read rotary settings wrongly."""
    assert len(list(machine.known_faults("transformers", version))) == faults
    assert list(machine.known_faults("numpy", version)) == []


def test_features_of_a_cpu_are_read_from_proc(monkeypatch, tmp_path):
    cpu = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "CPU_FILE", cpu)
    cpu.write_text("vendor_id : AuthenticAMD\nmodel name : AMD EPYC 9654\nflags : fpu avx2 avx512f\n")
    found = list(machine.check_cpu(Request()))
    assert "AMD EPYC 9654; AVX2, AVX-512" in found[0].text
    assert [finding.remedy for finding in found[1:3]] == [
        "set training.enable_onednn = true for training on this CPU",
        'for training on it set training.mixed_precision_param = "float32"',
    ]
    cpu.write_text("vendor_id : GenuineIntel\nmodel name : Xeon\nflags : avx2 avx512f amx_tile amx_bf16\n")
    found = list(machine.check_cpu(Request()))
    assert "AMX, AMX bf16" in found[0].text
    assert {finding.level for finding in found} == {"ok"}


def test_available_memory_is_that_of_the_cgroup_if_it_is_less(monkeypatch, tmp_path):
    for name, text in (("MEMORY_FILE", "MemTotal: 9 kB\nMemAvailable: 2048 kB\n"), ("CGROUP_LIMIT_FILE", "1048576\n")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(machine, name, tmp_path / name)
    assert machine.available_memory() == 1 << 20
    (tmp_path / "CGROUP_LIMIT_FILE").write_text("max\n")
    assert machine.available_memory() == 2 << 20


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
from titan_cpt.doctor.machine import check_limits
print(*(f"{each.level}|{each.topic}|{each.remedy}" for each in check_limits(None)), sep="\\n")
"""


@pytest.mark.parametrize(("files", "level"), [(200, "problem"), (1024, "note"), (4096, "ok")])
def test_limits_of_a_process_are_reported(files, level):
    """In a process that really has them."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < files:
        pytest.skip("this machine does not allow that many open files")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(files)], capture_output=True, text=True, check=True)
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith(f"{level}|open files|")
    assert second == "problem|file size|ulimit -f unlimited"


def test_little_shared_memory_is_a_note(monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("usage", (), {"free": 64 << 20}))
    found = by_topic(machine.check_limits(Request()))["shared memory"]
    assert (found.level, found.text.partition(" in ")[0]) == ("note", "64 MiB free")
    assert "--shm-size" in found.remedy
