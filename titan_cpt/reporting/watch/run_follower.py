"""A run that may still be training, followed line by line: its curves in few bytes a step, its position, its events.

Only lines that were appended since the last look are read. A step takes 40 bytes, so that a run of a million steps fits
into 40 MB. Steps that a rollback, a resume or a repeated stage undoes disappear, by the rules of common/metrics_file.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_cpt.common.metrics_file import Line, MetricsHistory, MetricsTail
from titan_cpt.common.planned_tokens import PlannedTokens
from titan_cpt.common.run_folder import METRICS_FILE, PLAN_FILE
from titan_cpt.common.weights.named_weights import split_average
from titan_cpt.reporting.run_log import read_plan
from titan_cpt.reporting.run_state import FAILED, run_state

_EVENTS_KEPT = 100
_STEPS_OF_SPEED = 50  # whose throughput predicts the time left


class StepCurve:
    """Values by step, in steps that ascend; NaN where a value is not finite or missing."""

    def __init__(self, *names: str) -> None:
        self.steps = array("q")
        self.values = {name: array("d") for name in names}

    def put(self, step: int, line: Mapping[str, Any]) -> None:
        """Add a step, or replace it."""
        index = len(self.steps)
        if index and step <= self.steps[-1]:
            index = bisect_left(self.steps, step)
            if self.steps[index] == step:
                for name, values in self.values.items():
                    values[index] = _number(line.get(name))
                return
        self.steps.insert(index, step)
        for name, values in self.values.items():
            values.insert(index, _number(line.get(name)))

    def cut(self, after: int) -> None:
        """Drop the steps after this one."""
        index = bisect_right(self.steps, after)
        del self.steps[index:]
        for values in self.values.values():
            del values[index:]

    def last(self, name: str) -> float:
        """The newest value; NaN if there is none."""
        return self.values[name][-1] if self.steps else math.nan


class StageCurves:
    """What was measured in a stage.

    Attributes:
        training: loss, gradient norm, LR and throughput of every step.
        validations: loss and forgetting of each dataset.
        checkpoints: `checkpoint` events by step.
    """

    def __init__(self) -> None:
        self.training = StepCurve("loss_nats_per_token", "grad_norm", "lr", "tokens_per_s")
        self.validations: dict[str, StepCurve] = {}
        self.checkpoints: dict[int, Line] = {}

    @property
    def is_begun(self) -> bool:
        """Whether anything was measured in it."""
        return bool(self.training.steps or self.checkpoints or any(one.steps for one in self.validations.values()))

    @property
    def step(self) -> int:
        """Steps done."""
        ends = [curve.steps[-1] for curve in (self.training, *self.validations.values()) if curve.steps]
        return max([0, *ends, *self.checkpoints])


class _Store:
    """The curves of every stage; the `LineStore` of MetricsHistory."""

    def __init__(self) -> None:
        self.stages: dict[str, StageCurves] = {}

    def of(self, stage: str) -> StageCurves:
        return self.stages.setdefault(stage, StageCurves())

    def add_train(self, line: Line) -> None:
        self.of(line["stage"]).training.put(line["step"], line)

    def add_validation(self, line: Line) -> None:
        if not line.get("measured_again"):
            curves = self.of(line["stage"]).validations
            curve = curves.setdefault(line["dataset"], StepCurve("loss_nats_per_token", "forgetting_nats_per_token"))
            curve.put(line["step"], line)

    def add_metric(self, line: Line) -> None:
        pass  # metrics of other packages are not shown

    def add_checkpoint(self, line: Line) -> None:
        self.of(line["stage"]).checkpoints[line["step"]] = line

    def last_train_step(self, stage: str) -> int | None:
        steps = self.of(stage).training.steps
        return steps[-1] if steps else None

    def undo(self, stage: str, *, after: int) -> None:
        curves = self.of(stage)
        for curve in (curves.training, *curves.validations.values()):
            curve.cut(after)
        for step in [step for step in curves.checkpoints if step > after]:
            del curves.checkpoints[step]


class RunFollower:
    """A run's folder, read again and again.

    Attributes:
        folder: the run's folder.
        plan: its plan.json; empty as long as there is none.
        tokens: the tokens of every step of the plan.
        newest: the last line of a training step, for memory and MFU.
        events: the last events, oldest first, those of undone steps included.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan: Mapping[str, Any] = {}
        self.tokens = PlannedTokens({})
        self._plan_time = -1.0
        self._forget()

    def _forget(self) -> None:
        self._tail = MetricsTail(self.folder)
        self._store = _Store()
        self._history = MetricsHistory(self.stage_names, self._store)
        self.newest: Line = {}
        self.events: deque[Line] = deque(maxlen=_EVENTS_KEPT)

    def refresh(self, most_bytes: int = 1 << 24) -> bool:
        """Read the plan if it has changed, and the next lines; returns whether there is more to read.

        Raises:
            DataError: plan.json is damaged.
        """
        self._read_plan()
        if self._tail.was_replaced():
            self._forget()
        before = self._tail.share_read
        for line in self._tail.read(most_bytes):
            if line["kind"] == "event":
                self.events.append(line)
            elif line["kind"] == "train":
                self.newest = line
            self._history.add(line)
        return before < self._tail.share_read < 1.0

    @property
    def is_there(self) -> bool:
        """Whether the folder is that of a run."""
        return any((self.folder / name).exists() for name in (PLAN_FILE, METRICS_FILE))

    def state(self) -> tuple[str, str]:
        """As `run_state`: running, finished, ...; and the process or the reason."""
        if not self.is_there:
            return FAILED, f"{self.folder} was removed or renamed"
        begun = any(self.curves(stage).is_begun for stage in self.steps)
        return run_state(self.folder, self._planned, list(self.events), is_begun=begun, last_write_s=self.last_write_s)

    @property
    def share_read(self) -> float:
        """The part of metrics.jsonl that has been read."""
        return self._tail.share_read

    @property
    def last_write_s(self) -> float | None:
        """Unix time at which metrics.jsonl was last written to; None if there is none."""
        try:
            return (self.folder / METRICS_FILE).stat().st_mtime
        except OSError:
            return None

    @property
    def damaged_lines(self) -> int:
        """Lines that could not be read."""
        return self._tail.damaged_lines

    @property
    def stage_names(self) -> list[str]:
        """Stages of the plan."""
        return [stage["name"] for stage in self.plan.get("stages", ())]

    @property
    def steps(self) -> dict[str, int]:
        """Planned steps by stage; without a plan, the steps done."""
        return self._planned or {name: self.curves(name).step for name in self._history.stages}

    @property
    def _planned(self) -> dict[str, int]:
        return {stage["name"]: stage["steps"] for stage in self.plan.get("stages", ())}

    def curves(self, stage: str) -> StageCurves:
        """What was measured in a stage so far."""
        return self._store.of(stage)

    @property
    def stage(self) -> str:
        """The stage that is trained now, or was trained last; the first if none has begun; "" without a plan."""
        begun = [name for name in self.steps if self.curves(name).is_begun]
        return (begun or [*self.steps, ""][:1])[-1]

    @property
    def run_step(self) -> int:
        """Steps done in all stages."""
        names = list(self.steps)
        before = names[: names.index(self.stage)] if self.stage else []
        return sum(self.steps[name] for name in before) + (self.curves(self.stage).step if self.stage else 0)

    def seconds_left(self, *, whole_run: bool) -> float:
        """Time that the rest of the current stage, or of the run, takes at the recent FLOP/s; NaN if it is unknown."""
        stage = self.stage
        speeds: Sequence[float] = self.curves(stage).training.values["tokens_per_s"][-_STEPS_OF_SPEED:]
        known = [speed for speed in speeds if speed > 0]
        if not known or stage not in self.tokens.stages:
            return math.nan
        flops = self.tokens.flops_between(stage, self.curves(stage).step, whole_run=whole_run)
        return flops / self.tokens.stages[stage].flops_per_token * sum(1 / speed for speed in known) / len(known)

    def datasets(self) -> list[str]:
        """Datasets with a validation loss, in the order in which stages train them, then the others."""
        found = {name for stage in self.steps for name, curve in self.curves(stage).validations.items() if curve.steps}
        trained = [name for stage in self.plan.get("stages", ()) for name in stage["datasets"]]
        order = {name: index for index, name in reversed(list(enumerate(trained)))}
        return sorted(found, key=lambda name: (order.get(name.partition("@")[0].partition(".")[0], len(order)), name))

    def newest_validation(self, dataset: str) -> tuple[float, float]:
        """Loss and forgetting of a dataset at its last validation; NaN if unknown.

        An average belongs to the stage that is trained now, which has none before its first snapshot.
        """
        for stage in reversed(self.steps):
            curve = self.curves(stage).validations.get(dataset)
            if split_average(dataset)[1] and self.curves(stage).is_begun and (curve is None or not curve.steps):
                break
            if curve is not None and curve.steps:
                return curve.last("loss_nats_per_token"), curve.last("forgetting_nats_per_token")
        return math.nan, math.nan

    def newest_checkpoint(self) -> Line | None:
        """The event of the newest checkpoint that was not undone."""
        for stage in reversed(self.steps):
            if checkpoints := self.curves(stage).checkpoints:
                return checkpoints[max(checkpoints)]
        return None

    def _read_plan(self) -> None:
        try:
            changed = (self.folder / PLAN_FILE).stat().st_mtime
        except OSError:
            return
        if changed != self._plan_time:
            before = self.stage_names
            self.plan, self._plan_time = read_plan(self.folder), changed
            self.tokens = PlannedTokens(self.plan)
            if self.stage_names != before:
                self._forget()


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
