"""Rows for a tracker, read from metrics.jsonl: numbers with a step, tokens and a time. Names are those of TensorBoard.

A row is a pure function of the lines up to its own, so a process that was killed continues exactly where it stopped.
Lines of steps that were undone (after a crash, a rollback, a stage that was trained again) are rows too: the tracker
shows what happened, in the order in which it happened.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.common.metrics_file import parse_line, table_curves
from titan_cpt.common.planned_tokens import PlannedTokens
from titan_cpt.common.run_folder import METRICS_FILE, PLAN_FILE
from titan_cpt.common.weights.named_weights import AVERAGE, suffix_of
from titan_cpt.config.suites import SUITES

_CHUNK_BYTES = 1 << 20
_TRAIN = {  # key in metrics.jsonl: name in the tracker
    "loss_nats_per_token": "train/loss_nats_per_token",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "replayed_tokens": "data/replayed_tokens",
    "tokens_per_s": "throughput/tokens_per_s",
    "mfu": "throughput/mfu",
    "memory_gib": "throughput/memory_gib",
}
_MARKED_EVENTS = ("transition", "resume", "skip_batch", "loss_spike", "stop")


@dataclass(frozen=True)
class MetricsRow:
    """The numbers of one line of metrics.jsonl.

    Attributes:
        line: its number in metrics.jsonl, from 1.
        values: by name; none is NaN or infinite.
        run_step: steps of the run, earlier stages included.
        tokens: tokens trained on by then.
        time: Unix time in seconds: that of the last event, plus the duration of the steps since then.
    """

    line: int
    values: dict[str, float]
    run_step: int
    tokens: int
    time: float


class ReplacedError(Exception):
    """metrics.jsonl is shorter than the part of it that was read: another file has taken its place."""


class RowReader:
    """Reads the rows of a run's metrics.jsonl, which may still be growing.

    Attributes:
        lines: number of lines read.
        crc: CRC-32 of the last line read; 0 before the first.
    """

    def __init__(self, run: Path) -> None:
        self.lines = 0
        self.crc = 0
        self._path = run / METRICS_FILE
        self._offset = 0
        self._time = 0.0
        self._run_step = 0
        self._tokens = 0
        plan = read_json(run / PLAN_FILE)
        self._planned = PlannedTokens(plan)
        self._step_tokens = 0  # of a step that is not in the plan
        self._before: dict[str, int] = {}
        self._stage_number: dict[str, int] = {}
        steps = 0
        for number, stage in enumerate(plan.get("stages", ()), 1):
            self._before[stage["name"]], self._stage_number[stage["name"]] = steps, number
            steps += stage["steps"]

    def read(self, most: int | None = None) -> list[MetricsRow]:
        """The rows of the next lines, of about a megabyte at most. A line without its newline is not read yet.

        Args:
            most: read at most this number of lines.

        Raises:
            ReplacedError: the file has become shorter.
            OSError: the file cannot be read.
        """
        with self._path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                raise ReplacedError(f"{self._path} was replaced by a shorter file")
            file.seek(self._offset)
            chunk = file.read(_CHUNK_BYTES) + file.readline()
        rows = []
        for line in chunk.split(b"\n")[:-1][:most]:
            self._offset += len(line) + 1
            self.lines += 1
            self.crc = zlib.crc32(line)
            rows += self._rows(line)
        return rows

    def row_at_end(self, values: Mapping[str, float]) -> MetricsRow:
        """Values at the place of the last line that was read."""
        return MetricsRow(self.lines, dict(values), self._run_step, self._tokens, self._time)

    def _rows(self, text: bytes) -> list[MetricsRow]:
        line = parse_line(text.decode(errors="replace"))
        try:
            values = {} if line is None else self._values(line)
        except (KeyError, TypeError, AttributeError, ArithmeticError):
            return []  # a damaged line; reports name it
        finite = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        if not finite:
            return []
        return [self.row_at_end(finite)]

    def _values(self, line: Mapping[str, Any]) -> dict[str, Any]:
        self._advance(line)
        if line["kind"] == "train":
            names = dict(_TRAIN)
            if "memory_active_gib" in line:
                names |= {"memory_active_gib": "memory/max_active(GiB)"}
            values = {name: line.get(key) for key, name in names.items()}
            values["data/stage"] = self._stage_number.get(line["stage"])
            if "memory_active_gib" in line:
                values["memory/max_reserved(GiB)"] = line.get("memory_gib")
            return values | table_curves(line)
        if line["kind"] == "validation":
            if line.get("measured_again"):
                return {}
            names = {key: f"validation/{line['dataset']}/{key}" for key in ("loss_nats_per_token", "bits_per_byte")}
            names["forgetting_nats_per_token"] = f"forgetting/{line['dataset']}"
            return {name: line.get(key) for key, name in names.items()}
        if line["kind"] == "metric":
            return {f"metric/{line['metric']}/{line['name']}": line["value"]}
        return self._event(line) if line["kind"] == "event" else {}

    def _event(self, event: Mapping[str, Any]) -> dict[str, Any]:
        name = event["name"]
        if name in _MARKED_EVENTS:
            return {f"event/{name}": 1}
        if name == "validation_changed":
            return {f"validation_changed/{dataset}": 1 for dataset in event["datasets"]}
        if name == "evaluation":
            return _scores(event)
        return {}

    def _advance(self, line: Mapping[str, Any]) -> None:
        """Set step and time to those of the line."""
        stage, step = line.get("stage"), line.get("step")
        if line["kind"] == "train":
            self._run_step, self._tokens = line["run_step"], line["tokens"]
            self._before.setdefault(line["stage"], line["run_step"] - line["step"])
            self._step_tokens = self._step_tokens or line["tokens"] // line["run_step"]
            if line.get("tokens_per_s"):
                self._time += self._tokens_of_step(line["stage"], line["step"]) / line["tokens_per_s"]
        elif isinstance(step, int) and stage in self._before:
            self._run_step = self._before[stage] + step
            self._tokens = self._run_step * self._step_tokens
            if self._is_planned(stage):
                self._tokens = self._planned.at(stage, step)
        if line["kind"] == "event" and line.get("time"):
            self._time = float(line["time"])

    def _is_planned(self, stage: str) -> bool:
        return stage in self._planned.stages and self._planned.total > 0

    def _tokens_of_step(self, stage: str, step: int) -> int:
        return self._planned.stages[stage].of_step(step) if self._is_planned(stage) else self._step_tokens


def _scores(event: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of benchmarks, with the names that `evaluate` uses in TensorBoard."""
    metrics = {task.name: task.metric for task in SUITES.get(event["suite"], ())}
    suffix = suffix_of(event.get("weights") == AVERAGE)
    values = {}
    for task, value in event["scores"].items():
        if task == "average":
            values[f"evaluation/{event['suite']}{suffix}/average"] = value
        else:
            metric = metrics.get(task)
            values[f"evaluation/{task}{suffix}/{metric}" if metric else f"evaluation/{task}{suffix}"] = value
    return values


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing, damaged or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
