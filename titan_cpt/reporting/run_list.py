"""The runs below a folder, one line each: state, stage and step, newest losses, size and age; for `titan-cpt runs`.

Only the end of a run's metrics.jsonl is read, and no checkpoint is opened, so that long runs are listed as fast as
short ones. A folder that cannot be read becomes a line with the reason.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from titan_cpt.common.metrics_file import Metrics, read_metrics
from titan_cpt.common.readable import duration, memory
from titan_cpt.common.run_folder import (
    CONFIG_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    PLAN_FILE,
    SWEEP_CONFIG_FILE,
)
from titan_cpt.errors import DataError, TitanError, os_error_message
from titan_cpt.reporting.run_log import read_plan
from titan_cpt.reporting.run_state import FAILED, run_state

DAMAGED = "damaged"
_RUN_FILES = (PLAN_FILE, METRICS_FILE, CONFIG_FILE, SWEEP_CONFIG_FILE)
_DEEPEST = 3  # folders between the given one and a run: the runs of a sweep are in a folder of the sweep
_MOST_LOSSES = 4  # in a line of the table; --json has all
_TAILS = (2**16, 2**20, 2**24)  # bytes of metrics.jsonl to read, until they contain a validation


@dataclass(frozen=True)
class ListedRun:
    """A run in the list.

    Attributes:
        name: its path below the folder that is listed.
        state: running, finished, stopped (by a signal, saved), failed, planned (not begun) or damaged.
        why: the reason of a failed or damaged run; the process of a running one.
        stage: name of the stage that is trained, or was trained last; "" if none was.
        step, steps: steps done in that stage, and its planned steps.
        run_steps, total_steps: steps done in all stages, and their planned steps.
        losses: newest validation loss of each dataset, in nats per token.
        measured_at: steps done in the stage at that validation.
        bytes: size of all files; a file with several links counts once.
        checkpoints: number of valid checkpoints.
        last_write_s: Unix time at which the run was last written to.
    """

    name: str
    folder: Path
    state: str
    why: str = ""
    stage: str = ""
    step: int = 0
    steps: int = 0
    run_steps: int = 0
    total_steps: int = 0
    losses: Mapping[str, float] = field(default_factory=dict)
    measured_at: int | None = None
    bytes: int = 0
    checkpoints: int = 0
    last_write_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """As an object of `titan-cpt runs --json`."""
        return {**vars(self), "folder": str(self.folder), "losses": dict(self.losses)}


def list_runs(folder: Path, sort: str = "age") -> list[ListedRun]:
    """The runs in a folder and its subfolders; if it is a run itself, only that one.

    Args:
        sort: "age" (last written first), "name" or "size" (largest first).

    Raises:
        DataError: the folder does not exist.
        OSError: the folder cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give the folder that contains the runs, as job.output_dir does")
    os.scandir(folder).close()
    runs = sorted((describe_run(path, folder) for path in _run_folders(folder, _DEEPEST)), key=lambda run: run.name)
    if sort == "name":
        return runs
    return sorted(runs, key=lambda run: run.bytes if sort == "size" else run.last_write_s, reverse=True)


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """The folder if it is a run, or its user may not look into it; else the runs below it."""
    try:
        is_run = any((folder / name).is_file() for name in _RUN_FILES)
    except PermissionError:
        is_run = True
    if is_run:
        yield folder
    elif depth:
        try:
            with os.scandir(folder) as entries:
                folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return  # not readable: whether it contains runs is unknown
        for path in sorted(entry.path for entry in folders if not entry.name.startswith(".")):
            yield from _run_folders(Path(path), depth - 1)


def describe_run(path: Path, listed: Path) -> ListedRun:
    """One run of the list; an error becomes the reason of a damaged one.

    Args:
        listed: the folder that the run's name is relative to.
    """
    name = path.name if path == listed else str(path.relative_to(listed))
    size, checkpoints = _size(path)
    known: dict[str, Any] = {"bytes": size, "checkpoints": checkpoints, "last_write_s": _last_write(path)}
    try:
        plan = read_plan(path) if (path / PLAN_FILE).exists() else {}
        metrics = _newest_metrics(path, [stage["name"] for stage in plan.get("stages", ())])
        return ListedRun(name, path, **known, **_progress(path, plan, metrics, known["last_write_s"]))
    except (OSError, TitanError) as error:
        why = str(error) if isinstance(error, TitanError) else os_error_message(error)
        return ListedRun(name, path, DAMAGED, why.removeprefix(f"{path}/"), **known)


def _newest_metrics(run: Path, stages: Sequence[str]) -> Metrics:
    """The end of metrics.jsonl; as much of it as contains a validation."""
    path = run / METRICS_FILE
    if not path.exists():
        return Metrics()
    size = path.stat().st_size
    metrics = Metrics()
    for last_bytes in _TAILS:
        metrics = read_metrics(run, stages, last_bytes=last_bytes)
        if metrics.validations or last_bytes >= size:
            break
    return metrics


def _progress(run: Path, plan: Mapping[str, Any], metrics: Metrics, last_write_s: float) -> dict[str, Any]:
    """The fields of a ListedRun that follow from its plan and the end of its log."""
    steps = {stage["name"]: stage["steps"] for stage in plan.get("stages", ())}
    lines = [*metrics.trains, *metrics.validations, *metrics.checkpoints]
    order = {name: index for index, name in enumerate([*steps, *(line["stage"] for line in lines)])}
    position = max(((order[line["stage"]], line["step"], line["stage"]) for line in lines), default=(0, 0, ""))
    _, step, stage = position
    newest = metrics.validations[-1] if metrics.validations else None
    losses = {
        line["dataset"]: line["loss_nats_per_token"]
        for line in metrics.validations
        if newest
        and (line["stage"], line["step"]) == (newest["stage"], newest["step"])
        and line["loss_nats_per_token"] is not None
    }
    before = sum(count for name, count in steps.items() if order[name] < order.get(stage, 0))
    state, why = run_state(run, steps, metrics.events, is_begun=bool(lines), last_write_s=last_write_s)
    return {
        **{"state": state, "why": why, "stage": stage, "step": step, "steps": steps.get(stage, step)},
        **{"run_steps": before + step, "total_steps": sum(steps.values()) or step},
        **{"losses": losses, "measured_at": newest["step"] if newest else None},
    }


def _last_write(run: Path) -> float:
    """Unix time of the newest of the run's own files; of its folder if it has none."""
    times = []
    for path in [run / name for name in _RUN_FILES]:
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    try:
        return max(times) if times else run.stat().st_mtime
    except OSError:
        return 0.0  # removed since the folder was listed


def _size(run: Path) -> tuple[int, int]:
    """Bytes of all files below a folder, and the number of checkpoints; what cannot be read counts as 0."""
    total, checkpoints = 0, 0
    linked: set[int] = set()
    waiting = [(str(run), 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((entry.path, depth + 1))
                        continue
                    found = entry.stat(follow_symlinks=False)
                    if found.st_nlink == 1 or found.st_ino not in linked:
                        total += found.st_size
                        linked |= {found.st_ino} if found.st_nlink > 1 else set()
                    checkpoints += depth == 2 and entry.name == MANIFEST_FILE
        except OSError:
            continue
    return total, checkpoints


def print_runs_table(runs: Sequence[ListedRun], console: Console) -> None:
    """Print a line for each run, the reasons of failed and damaged ones, and the size of all."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in ("run", "state", "stage", "step", "losses (nats per token)", "size", "written"):
        table.add_column(column, justify="right" if column in ("step", "size", "written") else "left", overflow="fold")
    for run in runs:
        losses = "  ".join(f"{dataset} {loss:.3f}" for dataset, loss in list(run.losses.items())[:_MOST_LOSSES])
        if len(run.losses) > _MOST_LOSSES:
            losses += f"  and {len(run.losses) - _MOST_LOSSES} more"
        step = f"{run.step:,}/{run.steps:,}" if run.stage else (f"0/{run.total_steps:,}" if run.total_steps else "")
        size, age = memory(run.bytes / 2**30), f"{duration(max(0.0, time.time() - run.last_write_s))} ago"
        table.add_row(*map(escape, (run.name, run.state, run.stage, step, losses, size, age)))
    console.print(table)
    for run in runs:
        if run.why and run.state in (FAILED, DAMAGED):
            console.print(f"{run.name}: {run.state}: {run.why}", highlight=False, markup=False, soft_wrap=True)
    total = memory(sum(run.bytes for run in runs) / 2**30)
    console.print(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {total}", highlight=False)
