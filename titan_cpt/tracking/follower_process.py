"""The trainer's side of tracking: start a follower process for each tracker, and wait for them at the end.

No step waits for a follower: it reads metrics.jsonl, and between its start and the end of training the trainer does
nothing but print the lines that it sends.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import IO

from titan_cpt.common.run_folder import METRICS_FILE, TRACKERS_FOLDER
from titan_cpt.common.signals import StopRequest
from titan_cpt.config.schema import Config
from titan_cpt.errors import ConfigError, how_to_install
from titan_cpt.tracking.position import NOTE, log_file, read_position
from titan_cpt.tracking.trackers import configured

_AFTER_SIGNAL_S = 5.0
_GRACE_S = 2.0
_POLL_S = 0.05
_LONGEST_LOG_BYTES = 1 << 20
_OF_THE_JOB = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_", "NCCL_")


def require_clients(config: Config) -> None:
    """Check that the client of every configured tracker is installed.

    Raises:
        ConfigError: one is not.
    """
    for name in configured(config.metrics):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder wandb/ here, which wandb itself makes, is no package
            raise ConfigError(
                f"metrics.{name}: the package {name} is not installed for {sys.executable}; {how_to_install(name)}; or "
                f"remove metrics.{name}: `titan-cpt track` can send the run later"
            )


@contextmanager
def trackers_following(
    config: Config,
    folder: Path,
    *,
    stop: StopRequest,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    rank: int = 0,
    begins: bool = True,
    overrides: Sequence[tuple[str, str]] = (),
) -> Iterator[None]:
    """Send a run to its trackers during the block; at its end wait for them for a bounded time.

    Args:
        stop: a signal that arrived before the end shortens the wait, and one that arrives during the wait ends it.
        say: prints where a run is found.
        warn: prints what a tracker lacks.
        rank: ranks other than 0 do nothing.
        begins: the block trains, and writes a `start` event first.
        overrides: settings that the config.toml in the folder does not have.
    """
    timeout_s = config.metrics.tracker_timeout_seconds
    arguments = ["--timeout", str(timeout_s)]
    for key, value in overrides:
        arguments += ["--override", key, value]
    if begins and rank == 0:
        arguments += ["--after", str((folder / METRICS_FILE).stat().st_size)]
    started = {}
    for name in configured(config.metrics) if rank == 0 else ():
        try:
            started[name] = _start(folder, name, arguments, lambda line: (warn if line.startswith(NOTE) else say)(line))
        except OSError as error:
            warn(
                f"{NOTE}no process for {name} can be started ({error}); `titan-cpt track {folder}` sends the run later"
            )
    try:
        yield
    finally:
        if started:
            _end(folder, started, min(timeout_s, _AFTER_SIGNAL_S) if stop.name else timeout_s, stop, warn)


def _start(folder: Path, name: str, arguments: Sequence[str], say: Callable[[str], None]) -> subprocess.Popen[str]:
    """Start a follower in its own session, without the job's variables and GPUs.

    Raises:
        OSError: that is impossible.
    """
    log = log_file(folder, name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_OF_THE_JOB)}
    hidden = {f"{vendor}_VISIBLE_DEVICES": "" for vendor in ("CUDA", "HIP", "ROCR")}
    (folder / TRACKERS_FOLDER).mkdir(exist_ok=True)
    if log.exists() and log.stat().st_size > _LONGEST_LOG_BYTES:
        log.unlink()
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "titan_cpt.tracking.follower", str(folder), name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**environment, **hidden, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            encoding="utf-8",
        )
    assert process.stdout is not None
    Thread(target=_relay, args=(process.stdout, say), daemon=True).start()
    return process


def _relay(lines: IO[str], say: Callable[[str], None]) -> None:
    with lines:
        for line in lines:
            say(line.rstrip())


def _end(
    folder: Path,
    started: dict[str, subprocess.Popen[str]],
    timeout_s: float,
    stop: StopRequest,
    warn: Callable[[str], None],
) -> None:
    """Tell the followers that training has ended, wait for them, and end those that are not done."""
    for process in started.values():
        assert process.stdin is not None
        with suppress(OSError):
            print(file=process.stdin, flush=True)  # closing is not enough: forked data-loader workers have it open too
        with suppress(OSError):
            process.stdin.close()
    signal_before, deadline = stop.name, time.monotonic() + timeout_s
    while time.monotonic() < deadline and stop.name == signal_before and _running(started):
        time.sleep(_POLL_S)
    late = _running(started)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for name in _running(started):
            with suppress(ProcessLookupError):
                os.killpg(started[name].pid, number)  # also the processes that the client started
        until = time.monotonic() + _GRACE_S
        while _running(started) and time.monotonic() < until:
            time.sleep(_POLL_S)
    for name, process in started.items():
        if process.returncode != 0:
            why = f"was not done after {timeout_s:g} s" if name in late else "could not be reached"
            warn(
                f"{NOTE}{name} {why} and lacks metrics after line {read_position(folder, name).lines:,} of "
                f"{METRICS_FILE}; `titan-cpt track {folder}` sends them; log: {log_file(folder, name)}"
            )


def _running(started: dict[str, subprocess.Popen[str]]) -> list[str]:
    return [name for name, process in started.items() if process.poll() is None]
