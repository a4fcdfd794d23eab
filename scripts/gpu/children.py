"""Run a function in a process of its own: forked from a server that has imported torch, ended with all its children.

The server never touches CUDA, so that every child may. A child's result is the JSON that its function returns; its
output goes to a log file. A child that exceeds its time is killed together with the processes that it started.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_started: set[int] = set()  # process groups that run, for `end_all`
PRELOADED = ["titan_cpt.train", "titan_cpt.cli", "torch._dynamo", "measure"]


def end_all() -> None:
    """Kill every process group that runs: children, and what `run_group` started."""
    for group in [*_started]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(group, signal.SIGKILL)


def run_group(command: list[str], *, log: Path, seconds: float, folder: Path | None = None) -> int | None:
    """Run a command in a process group of its own; its status, or None if it was killed after `seconds`."""
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        _started.add(process.pid)
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            _started.discard(process.pid)


class ChildError(Exception):
    """A child failed or exceeded its time; the message has the end of its output."""


def start_server() -> Any:
    """The context that forks children; its server starts with the first child."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Child:
    """A function that runs in a process and a session of its own.

    Args:
        function: importable by name; returns what JSON can hold.
        log: file for its output; the result is stored beside it.
        environment: variables that differ from this process's.
    """

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.log, self._result = log, log.with_suffix(".result.json")
        log.parent.mkdir(parents=True, exist_ok=True)
        self._result.unlink(missing_ok=True)
        passed = {name: os.environ[name] for name in (INDUCTOR_CACHE,) if name in os.environ}  # the server began before
        self._process = start_server().Process(
            target=_run, args=(function, arguments, str(log), str(self._result), passed | (environment or {}))
        )
        self._process.start()
        _started.add(self._process.pid)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return bool(self._process.is_alive())

    def kill(self) -> None:
        """End it and every process that it started with SIGKILL."""
        pid = self._process.pid
        assert pid is not None, "it was started"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self._process.join()
        _started.discard(pid)

    def wait(self, deadline: float) -> Any:
        """Its result.

        Raises:
            ChildError: it failed, or had not ended at `deadline` (time.monotonic) and was killed.
        """
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self.running:
            self.kill()
            raise ChildError(f"exceeded its time; {self.last_lines()}")
        _started.discard(self._process.pid)
        if self._process.exitcode != 0 or not self._result.exists():
            raise ChildError(f"ended with status {self._process.exitcode}; {self.last_lines()}")
        return json.loads(self._result.read_text())

    def last_lines(self, lines: int = 4) -> str:
        """The end of its output in one line."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        shown = [line.strip() for line in text.splitlines() if line.strip(" ^~|")][-lines:]
        return f"{self.log.name}: " + " / ".join(shown)[-600:]


def call(
    function: Callable[..., Any],
    *arguments: Any,
    log: Path,
    deadline: float,
    environment: dict[str, str] | None = None,
) -> Any:
    """Run a function in a child to its end; returns its result. Raises ChildError as `Child.wait` does."""
    child = Child(function, *arguments, log=log, environment=environment)
    try:
        return child.wait(deadline)
    finally:
        if child.running:
            child.kill()


def _run(function: Callable[..., Any], arguments: Any, log: str, result: str, environment: dict[str, str]) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)
    value = function(*arguments)
    Path(result).write_text(json.dumps(value))
