"""`titan-cpt doctor`: runs the checks, each in a process of its own with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from titan_cpt.doctor.finding import Finding, problem
from titan_cpt.doctor.request import Request

_PACKAGE = "titan_cpt.doctor"
_AT_ONCE = 3


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        topic: its name in findings about the check itself.
        function: MODULE:FUNCTION; takes a `Request` and yields findings.
        timeout_s: longest time.
        needs_config: skipped without a config.
    """

    topic: str
    function: str
    timeout_s: float = 60.0
    needs_config: bool = False


CHECKS = (
    Check("python", f"{_PACKAGE}.machine:check_python"),
    Check("packages", f"{_PACKAGE}.machine:check_installation"),
    Check("cpu", f"{_PACKAGE}.machine:check_cpu"),
    Check("limits", f"{_PACKAGE}.machine:check_limits"),
    Check("torch", f"{_PACKAGE}.gpu:check_torch", 120),
    Check("gpu", f"{_PACKAGE}.gpu:check_gpus", 120),
    Check("nccl", f"{_PACKAGE}.network:check_nccl", 120),
    Check("network", f"{_PACKAGE}.network:check_interfaces"),
    Check("port", f"{_PACKAGE}.network:check_port"),
    Check("gloo", f"{_PACKAGE}.network:check_all_reduce", 120),
    Check("output folder", f"{_PACKAGE}.config_checks:check_output", 120),
    Check("plan", f"{_PACKAGE}.config_checks:check_plan", 120, needs_config=True),
    Check("data", f"{_PACKAGE}.config_checks:check_data", 300, needs_config=True),
    Check("tokenizer", f"{_PACKAGE}.config_checks:check_tokenizer", 120, needs_config=True),
    Check("text", f"{_PACKAGE}.config_checks:check_text", 120, needs_config=True),
    Check("checkpoints", f"{_PACKAGE}.config_checks:check_checkpoints", 60, needs_config=True),
    Check("memory", f"{_PACKAGE}.config_checks:check_memory", 120, needs_config=True),
)


def examine(request: Request, checks: Sequence[Check] = CHECKS) -> Iterator[Finding]:
    """The findings of all checks, in order, as they come; some checks run at the same time."""
    chosen = [check for check in checks if request.config is not None or not check.needs_config]
    running: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures = [pool.submit(run_check, check, request, running) for check in chosen]
        try:
            for future in futures:
                yield from future.result()
        finally:  # Ctrl-C, or the reader of the findings has left
            for future in futures:
                future.cancel()
            for process in running:
                _kill(process)


def run_check(check: Check, request: Request, running: list[subprocess.Popen[str]] | None = None) -> list[Finding]:
    """The findings of one check; a crash, an exception and a hang are findings after those that were made before.

    Args:
        running: the check's process is appended here.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"{_PACKAGE}.run_check", check.function, check.topic],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a check that hangs is killed together with what it started
    )
    if running is not None:
        running.append(process)
    late = ""
    try:
        out, err = process.communicate(json.dumps(request.as_json()), timeout=check.timeout_s)
    except subprocess.TimeoutExpired:
        late = f"the check did not end within {check.timeout_s:g} s"
        _kill(process)
        out, err = process.communicate()
    findings = [Finding(**json.loads(line)) for line in out.splitlines() if line.endswith("}")]
    if late or process.returncode:
        findings.append(_fault(check, late, process.returncode, err))
    return findings


def _kill(process: subprocess.Popen[str]) -> None:
    if process.returncode is None:  # its number may belong to another process afterwards
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _fault(check: Check, late: str, status: int, err: str) -> Finding:
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    said = f": {lines[-1][:300]}" if lines else ""
    if late:
        return problem(check.topic, f"{late}{said}", "a disk, a driver or the network hangs: look there first")
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else "failed"
    return problem(check.topic, f"the check itself {how}{said}", "look at the lines above; if they do not explain it, "
                   f"report this, with the output of `{sys.executable} -m titan_cpt --version`")  # fmt: skip
