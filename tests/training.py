"""Helpers of the tests of training: small data, a small config, and runs of the real command in separate processes.

A run is `titan_cpt.cli.main(["train", ...])` in a process forked from a server that has torch imported already, which
saves the four seconds of the import; test_resume.py compares with a run of `python -m titan_cpt train` itself.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec.config
import numpy as np
import pytest
import tomli_w
import torch
from safetensors import safe_open

from titan_cpt.common.signals import StopRequest
from titan_cpt.config.load import load_config
from titan_cpt.config.schema import Config
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.loader import StageLoader
from titan_cpt.distributed.process_group import init_process_group
from titan_cpt.planning.plan import StagePlan
from titan_cpt.train import Trainer
from titan_cpt.training.build import build

THEIR_WARNINGS_IGNORED = [
    pytest.mark.filterwarnings(
        "ignore:'set_vital' is deprecated"
    ),  # raised inside torch when torchdata's loader starts
    pytest.mark.filterwarnings("ignore:torch.distributed is .*uninitialized"),  # DCP in a single process
]
END_OF_DOCUMENT = 256
LANGUAGES = ("en", "de")
BY_SOURCE = tuple(f"{prefix}{what}_by_source" for prefix in ("", "replay_") for what in ("loss", "tokens"))
"""Keys of a training line, each a table by source; a line has no table that would be empty."""

torch.set_num_threads(1)


def write_tokens(prefix: Path, *, language: int, tokens: int, seed: int = 0) -> Path:
    """Documents of a made-up language: each byte is one of three that may follow the last one. Twenty bytes in all."""
    rng = np.random.default_rng([language, seed])
    follows = np.random.default_rng(language).integers(97, 117, size=(256, 3))
    with IndexedWriter(prefix, 257) as writer:
        left = tokens
        while left > 0:
            length = min(left, int(rng.integers(30, 90)))
            document, byte = [], 97
            for choice in rng.integers(0, 3, size=length - 1):
                byte = int(follows[byte, choice])
                document.append(byte)
            writer.add_document([*document, END_OF_DOCUMENT])
            left -= length
    return prefix


def write_languages(folder: Path) -> Path:
    """Two languages, train and validation."""
    for number, name in enumerate(LANGUAGES, 1):
        write_tokens(folder / name, language=number, tokens=4000)
        write_tokens(folder / f"{name}-validation", language=number, tokens=700, seed=1)
    return folder


def two_stages(data: Path, out: Path) -> dict[str, Any]:
    """English with an infinite schedule, then German from before the annealing, with replay; the debug model, fp32."""
    return {
        "job": {"name": "run", "output_dir": str(out)},
        "model": {"family": "gpt_neox", "size": "debug"},
        "datasets": {
            name: {"train": str(data / name), "validation": str(data / f"{name}-validation")} for name in LANGUAGES
        },
        "training": {
            "global_batch_size": 4,
            "local_batch_size": 2,
            "seq_len": 16,
            "mixed_precision_param": "float32",
        },
        "checkpoint": {"interval": 4, "keep_latest_k": 2},
        "metrics": {"log_freq": 1, "enable_tensorboard": False},
        "validation": {"interval": 5, "sequences": 6},
        "stages": [
            {
                "name": "english",
                "dataset": "en",
                "steps": 12,
                "lr": {
                    "schedule": "infinite_cosine",
                    "max": 3e-3,
                    "constant": 2e-3,
                    "cooldown_until": 0.5,
                    "constant_until": 0.75,
                },
            },
            {
                "name": "german",
                "dataset": "de",
                "steps": 10,
                "optimizer_state": "keep",
                "lr": {"schedule": "cosine", "max": 2e-3, "warmup_until": 2},
                "replay": {"fraction": 0.25},
            },
        ],
    }


def third_stage() -> dict[str, Any]:
    """A stage to append: English again, with a reset optimizer."""
    return {"name": "again", "dataset": "en", "steps": 5, "lr": {"schedule": "constant", "max": 1e-3}}


def write_config(raw: dict[str, Any], path: Path) -> Path:
    """The dictionary as a TOML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(raw))
    return path


def changed(raw: dict[str, Any], **tables: Any) -> dict[str, Any]:
    """A copy with some keys of some tables replaced; `stages` takes a list in the place of the old one."""
    new = json.loads(json.dumps(raw))
    for name, value in tables.items():
        if isinstance(value, dict):
            new.setdefault(name, {}).update(value)
        else:
            new[name] = json.loads(json.dumps(value))
    return new


def config_of(raw: dict[str, Any]) -> Config:
    """The config as the program reads it."""
    return load_config(write_config(raw, Path(raw["job"]["output_dir"]) / f"{raw['job']['name']}.toml"))


@contextmanager
def built_trainer(config: Config) -> Iterator[Trainer]:
    """The trainer of a run in this process, built as the program does; nothing is trained yet."""
    folder = Path(config.job.output_dir) / config.job.name
    folder.mkdir(parents=True, exist_ok=True)
    with StopRequest() as stop:
        trainer, _ = build(Trainer, config, init_process_group(), folder, stop)
        try:
            yield trainer
        finally:
            trainer.checkpoints.wait()
            trainer.log.close()
            gc.enable()  # stage_steps leaves it off


# Runs in processes of their own


def loader_of(trainer: Trainer, stage: StagePlan) -> StageLoader:
    """The loader of a stage's first step, as a single rank has it."""
    return StageLoader(
        trainer.readers[stage.name],
        lambda step: trainer.plan.batch(stage, step),
        steps=stage.steps,
        first_step=0,
        batch_sizes=stage.batch_sizes,
        local_batch=stage.local_batch_size,
        rank=0,
        ranks=1,
        workers=0,
        source_numbers=stage.source_numbers,
        documents=trainer.documents(stage),
    )


@dataclass(frozen=True)
class Fault:
    """End the process with a signal when `place` ("module:name.name") is called for the `call`-th time.

    Attributes:
        number: the signal, SIGKILL by default.
        once_written: a checkpoint that must be whole by then: checkpoints are written in the background.
    """

    place: str
    call: int = 1
    once_written: Path | None = None
    number: int = signal.SIGKILL


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit status (negative: the signal), and all it printed."""

    status: int
    output: str


class Process:
    """A run under way."""

    def __init__(
        self,
        config: Path,
        *overrides: str,
        fault: Fault | None = None,
        largest_file_bytes: int | None = None,
        start_method: str = "fork",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.output = config.with_suffix(f".{time.monotonic_ns()}.txt")
        arguments = ["train", "--config", str(config), *overrides]
        self._process = _server().Process(
            target=_child,
            args=(
                arguments,
                str(self.output),
                fault,
                largest_file_bytes,
                start_method,
                {**os.environ, **(environment or {})},
            ),
        )
        self._process.start()
        atexit.register(self._process.kill)  # a failed test leaves none behind; a daemon could have no workers

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None, "it was started"
        return int(self._process.pid)

    def send(self, number: int) -> None:
        """Send a signal to it."""
        assert self._process.pid is not None, "it was started"
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def wait_for(self, what: Callable[[], bool], *, seconds: float = 60, ended_will_do: bool = False) -> None:
        """Wait until something is seen to have happened; fails if the process ends before."""
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, f"waited in vain; it printed:\n{self.output.read_text()}"
            if ended_will_do and not self._process.is_alive():
                return
            assert self._process.is_alive() or what(), f"it ended before; it printed:\n{self.output.read_text()}"
            time.sleep(0.002)

    def end(self, *, seconds: float = 120) -> Outcome:
        """Wait for its end."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"it did not end; it printed:\n{self.output.read_text()}")
        return Outcome(self._process.exitcode, self.output.read_text())


def train(config: Path, *overrides: str, **faults: Any) -> Outcome:
    """`titan-cpt train --config CONFIG ...` in a process of its own, to its end."""
    return Process(config, *overrides, **faults).end()


def _server() -> Any:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["titan_cpt.train", "training", "torch._dynamo", "lm_eval.evaluator"])
    return context


def _child(
    arguments: list[str],
    output: str,
    fault: Fault | None,
    largest_file_bytes: int | None,
    start_method: str,
    environment: dict[str, str],
) -> None:
    os.environ.clear()  # the fork server has the environment of the test that started it
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)  # read when fsspec was imported, before this process began
    multiprocessing.set_start_method(start_method, force=True)  # of the processes that read ahead for it
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if fault is not None:
        _lay(fault)
    if largest_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))
    from titan_cpt.cli import main

    main(arguments)


def _lay(fault: Fault) -> None:
    module, _, names = fault.place.partition(":")
    holder: Any = importlib.import_module(module)
    *path, name = names.split(".")
    for part in path:
        holder = getattr(holder, part)
    original, calls = getattr(holder, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.call:
            sys.stdout.flush()
            while fault.once_written is not None and not (fault.once_written / "manifest.json").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), fault.number)
        return original(*args, **kwargs)

    setattr(holder, name, deadly)


# What a run left


def lines_of(run: Path, kind: str = "") -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, of one kind if `kind` is given; [] before there is any."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return [line for line in found if kind in ("", line["kind"])]


def numbers_of(run: Path) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Everything that was measured, by (kind, stage, step, dataset); of what was written twice, the last."""
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for line in lines_of(run):
        key = (line["kind"], line.get("stage"), line.get("step"), line.get("dataset"))
        if line["kind"] == "train":
            names = ("loss_nats_per_token", "grad_norm", "lr", "batch_hash", "tokens", "run_step")
            found[key] = (*(line[name] for name in names), *(line.get(name) for name in BY_SOURCE))
        elif line["kind"] == "validation":
            names = ("loss_nats_per_token", "bits_per_byte", "forgetting_nats_per_token")
            found[key] = tuple(line[name] for name in names)
    return found


def events_of(run: Path, name: str = "") -> list[dict[str, Any]]:
    """The events of a run, those of one name if it is given."""
    return [line for line in lines_of(run, "event") if name in ("", line["name"])]


def checkpoints_of(run: Path) -> list[str]:
    """The checkpoints that have a manifest, as `stage/step-...`."""
    return sorted(str(path.parent.relative_to(run)) for path in run.glob("*/step-*/manifest.json"))


def forget_after(run: Path, *folders: str) -> None:
    """Remove checkpoints, as if the run had not reached them yet."""
    for folder in folders:
        shutil.rmtree(run / folder)


def once_for_all_workers(shared: Path, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the pytest process that comes first makes, and all others of a test run read.

    Args:
        shared: the base folder of this process's temporary folders.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / name
    folder.mkdir(exist_ok=True)
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            make(folder)
            (folder / "complete").touch()
    return folder


def tensors_of(checkpoint: Path, part: str = "model") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, read only with safetensors: "model" or "optimizer"."""
    found = {}
    for name, told in json.loads((checkpoint / "index.json").read_text())["tensors"].items():
        if not name.startswith(f"{part}."):
            continue
        pieces = []
        for piece in told["parts"]:
            beginning = f"@{','.join(map(str, piece['at']))}" if any(piece["at"]) else ""
            with safe_open(checkpoint / piece["file"], framework="pt") as file:
                pieces.append((piece["at"], file.get_tensor(name + beginning)))
        whole = torch.empty(told["shape"], dtype=pieces[0][1].dtype)
        for at, tensor in pieces:
            whole[tuple(slice(first, first + length) for first, length in zip(at, tensor.shape, strict=True))] = tensor
        found[name.removeprefix(f"{part}.")] = whole
    return found


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names and the same values to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
