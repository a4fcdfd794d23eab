"""Inject faults into runs: bad losses at chosen steps; and start several ranks, forked from a preloaded server.

A run here is `titan_cpt.cli.main([...])`, forked like those of training.py, with the environment that torchrun would
give it: four ranks start in the time of one fork each, not in eleven seconds.
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import training
from training import Fault, Outcome

import titan_cpt.train


@dataclass(frozen=True)
class BadNumbers:
    """Make the numbers of some steps of a stage bad, on one rank or on all.

    Attributes:
        kind: "nan gradient", or "spike": logits a hundred times too large, and so the loss and its true gradient.
        once: a file; with it each step is spoilt once and never again, in this process or a later one.
    """

    stage: str
    steps: tuple[int, ...]
    kind: str = "nan gradient"
    rank: int | None = None
    once: str = ""

    def lay(self) -> None:
        """Replace `Trainer.train_step` in this process."""
        sound = titan_cpt.train.Trainer.train_step

        def spoilt(trainer: Any, loader: Any, stage: Any, step: int, *lr: float) -> Any:
            if stage.name != self.stage or step not in self.steps or self._spent(step):
                return sound(trainer, loader, stage, step, *lr)
            if self.rank is not None and trainer.process.rank != self.rank:
                return sound(trainer, loader, stage, step, *lr)
            hook = trainer.model.register_forward_hook(_nan_gradient if self.kind == "nan gradient" else _wild)
            try:
                return sound(trainer, loader, stage, step, *lr)
            finally:
                hook.remove()

        titan_cpt.train.Trainer.train_step = spoilt

    def _spent(self, step: int) -> bool:
        if not self.once:
            return False
        marker = Path(f"{self.once}-{step}")
        spent = marker.exists()
        marker.touch()
        return spent


def _nan_gradient(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
    spoilt = logits * 1
    spoilt.register_hook(lambda gradient: gradient * torch.nan)
    return spoilt


def _wild(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits * 100


@dataclass(frozen=True)
class Life:
    """One start of a command and how it may end before its time.

    Attributes:
        main: "module:function", which is given the arguments.
    """

    arguments: tuple[str, ...]
    faults: tuple[Any, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    main: str = "titan_cpt.cli:main"


def start(life: Life, output: Path) -> Any:
    """Start the process."""
    output.touch()
    process = training._server().Process(target=_child, args=(life, str(output)))
    process.start()
    atexit.register(process.kill)
    return process


def outcome_of(process: Any, output: Path, *, seconds: float = 120) -> Outcome:
    """Wait for its end."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"it did not end; it printed:\n{output.read_text()}")
    return Outcome(process.exitcode, output.read_text())


def train(config: Path, *overrides: str, faults: Sequence[Any] = (), ranks: int = 1) -> Outcome:
    """Run `titan-cpt train --config CONFIG ...` on `ranks` ranks to its end; returns the outcome of rank 0."""
    return launch(config, *overrides, faults=faults, ranks=ranks)[0]


def launch(config: Path, *overrides: str, faults: Sequence[Any] = (), ranks: int = 1) -> list[Outcome]:
    """Like `train`; returns the outcome of every rank."""
    started = start_ranks(config, *overrides, faults=faults, ranks=ranks)
    return [outcome_of(process, output) for process, output in started]


def start_ranks(
    config: Path, *overrides: str, faults: Sequence[Any] = (), ranks: int = 1, only: int | None = None
) -> list[tuple[Any, Path]]:
    """Start all ranks and return their processes; a `Fault`, which kills, is injected into all ranks or into `only`."""
    life = Life(("train", "--config", str(config), *overrides), tuple(faults))
    return start_all(life, config, ranks=ranks, only=only)


def start_all(life: Life, beside: Path, *, ranks: int, only: int | None = None) -> list[tuple[Any, Path]]:
    """One process for each rank, and the file of its output, in the folder of `beside`."""
    shared: tuple[tuple[str, str], ...] = ()
    if ranks > 1:
        shared = (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free_port())), ("WORLD_SIZE", str(ranks)))
    started = []
    for rank in range(ranks):
        output = beside.with_suffix(f".{time.monotonic_ns()}.{rank}.txt")
        environment = (*shared, ("RANK", str(rank)), ("LOCAL_RANK", str(rank))) if ranks > 1 else ()
        own_faults = tuple(fault for fault in life.faults if only in (None, rank) or not isinstance(fault, Fault))
        started.append((start(replace(life, faults=own_faults, environment=environment), output), output))
    return started


def _child(life: Life, output: str) -> None:
    os.environ |= dict(life.environment)
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for fault in life.faults:
        if isinstance(fault, Fault):
            training._lay(fault)
        else:
            fault.lay()
    module, _, function = life.main.partition(":")
    getattr(importlib.import_module(module), function)(life.arguments)


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill(process: Any) -> None:
    """Send SIGKILL to a process that still runs."""
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
