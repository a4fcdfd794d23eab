"""Which device the tests see: none but the tests marked `gpu` sees a GPU, on any machine.

The expected values of the suite are a CPU's, so conftest.py hides all GPUs from its process and thereby from every
process that a test starts. On a machine with a GPU, the first test marked `gpu` that is due starts one further pytest,
which sees the GPUs and runs all tests with that mark, four at a time; each worker of pytest-xdist then reports the
outcome of the tests that it was given. Elsewhere these tests are skipped.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
ON_GPU = "TITAN_CPT_TESTS_ON_GPU"  # set in the pytest that sees the GPUs: file for its reports
SHARED = "TITAN_CPT_TESTS_SHARED"  # folder that the workers share; set by the process that starts them
ORIGINAL = "TITAN_CPT_TESTS_VISIBLE"  # values of HIDING before they were changed
_made: list[Path] = []  # the shared folder, in the process that made it
_GPU_WORKERS = 4  # each takes about 1 GiB of the GPU; most of a test's time is the CPU's
DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")


def prepare() -> None:
    """Hide the GPUs, and let every Python that a test starts find this checkout and what this Python imports from.

    Tests start Python in other folders, so relative paths in PYTHONPATH become absolute.
    """
    known = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *known]))
    if ON_GPU in os.environ:
        return
    if ORIGINAL not in os.environ:
        os.environ[ORIGINAL] = json.dumps({name: os.environ.get(name) for name in HIDING})
        _made.append(Path(tempfile.mkdtemp(prefix="titan-cpt-tests-")))
        os.environ[SHARED] = str(_made[0])
    for name in HIDING:
        os.environ[name] = ""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        raise pytest.UsageError(
            "a plugin of pytest used CUDA before tests/conftest.py could hide the GPUs: start pytest with "
            "CUDA_VISIBLE_DEVICES= (the tests marked gpu are then skipped), or without the plugin (-p no:NAME)"
        )


def clean_up() -> None:
    """Remove the shared folder, in the process that made it."""
    for folder in _made:
        shutil.rmtree(folder, ignore_errors=True)


def why_no_gpu() -> str:
    """Why the tests marked `gpu` cannot run on this machine; "" if they may. Does not ask the driver."""
    hidden = json.loads(os.environ.get(ORIGINAL, "{}")).get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return f"needs a GPU, which CUDA_VISIBLE_DEVICES={hidden!r} hides"
    if not any(Path(file).exists() for file in DEVICE_FILES) and shutil.which("nvidia-smi") is None:
        return "needs a GPU; this machine has none"
    return ""


def reports_of(item: pytest.Item) -> Iterator[pytest.TestReport]:
    """The reports of a test that was run where the GPUs are visible; runs all such tests if none has done so yet."""
    file = Path(os.environ[SHARED]) / "reports.jsonl"
    with (file.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            _run_with_gpus(item.session, file)
    config, found = item.config, False
    for line in file.read_text().splitlines():
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        if report.nodeid == item.nodeid:
            found = True
            if isinstance(report.longrepr, list):  # the reason of a skip, which JSON turns into a list
                report.longrepr = tuple(report.longrepr)
            yield report
    if not found:
        output = (file.parent / "output.txt").read_text()[-4000:]
        message = f"the process that runs the tests marked gpu ended before this test; its output:\n{output}"
        yield pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")


def record(config: pytest.Config, report: pytest.TestReport) -> None:
    """In the pytest that sees the GPUs: write a report for the worker that was given the test."""
    data: dict[str, Any] = config.hook.pytest_report_to_serializable(config=config, report=report)
    with open(os.environ[ON_GPU], "ab", buffering=0) as file:  # one write: workers append to the same file
        file.write((json.dumps(data) + "\n").encode())


def visible_again() -> dict[str, str]:
    """This environment with the GPUs visible as they were before `prepare`."""
    original = json.loads(os.environ[ORIGINAL])
    environment = {name: value for name, value in os.environ.items() if name not in (*HIDING, ORIGINAL, SHARED)}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST_")}
    return environment | {name: value for name, value in original.items() if value is not None}


def _run_with_gpus(session: pytest.Session, reports: Path) -> None:
    nodes = [item.nodeid for item in session.items if item.get_closest_marker("gpu")]
    where = [
        f"--rootdir={session.config.rootpath}",
        *(["-c", str(session.config.inipath)] * bool(session.config.inipath)),
    ]
    workers = str(min(_GPU_WORKERS, os.cpu_count() or 1, len(nodes)))
    command = [sys.executable, "-m", "pytest", "-n", workers, "-q", "-p", "no:cacheprovider", *where, *nodes]
    with (reports.parent / "output.txt").open("w") as output:
        subprocess.run(
            command,
            cwd=session.config.rootpath,
            env={**visible_again(), ON_GPU: str(reports)},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    reports.touch()
