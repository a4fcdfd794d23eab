"""Sections that run the repository's tests on this machine."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from children import run_group

if TYPE_CHECKING:
    from check import Context

ROOT = Path(__file__).resolve().parents[2]


def gpu_tests(context: Context) -> None:
    """The tests marked `gpu`, four at a time (tests/hardware.py)."""
    run_pytest(context, "tests marked gpu", ["-n", "0", "-m", "gpu", "tests/gpu"], slowest=context.left_s)


def whole(context: Context) -> None:
    """Every test, on all cores."""
    if context.tiny:
        context.skip("whole suite", "a dry run is itself part of the suite")
        return
    cores = str(min(16, os.cpu_count() or 2))
    run_pytest(context, "whole suite", ["-n", cores, "--dist", "worksteal", "-m", "not gpu", "tests"], slowest=120)


def run_pytest(context: Context, name: str, options: list[str], *, slowest: float) -> None:
    """Run pytest until the deadline and add a row with its counts, and one for each failure up to ten."""
    missing = [
        package
        for package in ("pytest", "xdist", "pytest_timeout", "hypothesis")
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        context.skip(name, f"not installed: {', '.join(missing)}")
        return
    found, log = context.folder / "junit.xml", context.folder / "pytest.log"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={found}",
        f"--timeout={slowest:.0f}",
        *options,
    ]
    status = run_group(command, log=log, seconds=context.left_s, folder=ROOT)
    if status is None:
        context.row(name, value=f"exceeded its time; {_last_line(log)}", ok=False)
        return
    if not found.exists():
        context.row(name, value=f"status {status}; {_last_line(log)}", ok=False)
        return
    suite = next(ElementTree.parse(found).iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"]
    context.figures.update(counts)
    passed = counts["tests"] - bad - counts["skipped"]
    context.row(
        name,
        value=f"{passed} passed, {bad} failed, {counts['skipped']} skipped",
        expected="0 failed",
        ok=bad == 0 and status in (0, 5),
    )
    failing = [case for case in suite.iter("testcase") if any(child.tag in ("failure", "error") for child in case)]
    for case in failing[:10]:
        reason = next(child.get("message") or "" for child in case if child.tag in ("failure", "error"))
        context.row(f"{case.get('classname')}::{case.get('name')}"[-46:], value=reason, ok=False)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
