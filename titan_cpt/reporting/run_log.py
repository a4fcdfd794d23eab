"""A run folder read back, finished or still training: its plan (plan.json) and its deduplicated log (metrics.jsonl)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan_cpt.common.metrics_file import read_metrics
from titan_cpt.common.run_folder import METRICS_FILE, PLAN_FILE
from titan_cpt.errors import DataError, TitanError

_RUNS_LISTED = 10


_STAGE_KEYS = ("name", "steps", "tokens", "union_tokens", "new_datasets", "datasets", "final_window")


@dataclass(frozen=True)
class RunLog:
    """A run's log of its present weights; see `read_metrics` for what that leaves out.

    Attributes:
        plan: plan.json, or what metrics.jsonl says of it where there is only that.
        trains: lines of steps, in the order of the run.
        validations: lines of measurements, likewise.
        events: all of them, in the order of time.
        checkpoints: `checkpoint` events of present weights.
        problems: a sentence for each part of the record that could not be read.
        renewed: measurements of a stage's first weights, made again on other validation data.
    """

    name: str
    folder: Path
    plan: Mapping[str, Any]
    trains: Sequence[Mapping[str, Any]]
    validations: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    checkpoints: Sequence[Mapping[str, Any]] = ()
    problems: Sequence[str] = ()
    renewed: Sequence[Mapping[str, Any]] = ()

    def comparable(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether two measurements of a dataset had the same validation data and windows.

        Lines of older versions do not say: theirs are among each other, and with others unless a change of the dataset
        was recorded.
        """
        identities = one.get("validation_id"), other.get("validation_id")
        if identities == (None, None) or None not in identities:
            return identities[0] == identities[1]
        changes = [event.get("datasets", ()) for event in self.events if event["name"] == "validation_changed"]
        return not any(one["dataset"] in datasets for datasets in changes)

    @property
    def total_tokens(self) -> int:
        """Tokens of all stages to their ends."""
        return int(sum(stage["steps"] for stage in self.plan["stages"]) * self.plan["step_tokens"])

    def tokens_at(self, stage: str, step: int) -> int:
        """Tokens that the run had trained on after `step` steps of a stage, earlier stages included."""
        before = 0
        for each in self.plan["stages"]:
            if each["name"] == stage:
                break
            before += each["steps"]
        return int((before + step) * self.plan["step_tokens"])


def read_run(path: Path) -> RunLog:
    """The record of a run's folder, or of a metrics.jsonl alone; of a run that is still training, as far as it is.

    Raises:
        DataError: it is neither, or its plan cannot be read. Damaged lines of metrics.jsonl are skipped, and named in
            the record's `problems`.
    """
    run = path.parent if path.name == METRICS_FILE else path
    has_plan, has_metrics = (run / PLAN_FILE).exists(), (run / METRICS_FILE).exists()
    if not has_plan and not has_metrics:
        raise DataError(_what_is_there(path))
    plan = _read_plan(run) if has_plan else {}
    if not has_metrics:
        return RunLog(plan["name"], run, plan, [], [], [], problems=[f"{run}: has no {METRICS_FILE}"])
    found = read_metrics(run, [stage["name"] for stage in plan["stages"]] if plan else [])
    plan = plan or _told_by_lines(run.name, found.trains, found.validations)
    names = {stage["name"] for stage in plan["stages"]}
    trains, validations, saved, renewed = (
        [line for line in lines if line["stage"] in names]
        for lines in (found.trains, found.validations, found.checkpoints, found.renewed)
    )
    problems = [
        f"{plan['name']}: the validation loss of {line['dataset']} after step {line['step']:,} of {line['stage']} is "
        "not finite"
        for line in validations
        if line["loss_nats_per_token"] is None
    ]
    problems = [*found.problems, *problems[:1], *([f"and {len(problems) - 1:,} more"] if len(problems) > 1 else [])]
    return RunLog(plan["name"], run, plan, trains, validations, found.events, saved, problems, renewed)


def read_runs(paths: Sequence[Path], complain: Callable[[str], None]) -> list[RunLog]:
    """The records of several runs; one that cannot be read is named to `complain` and does not end the others."""
    records = []
    for path in paths:
        try:
            records.append(read_run(path))
        except TitanError as error:
            complain(str(error))
    return records


def with_unique_names(records: Sequence[RunLog]) -> list[RunLog]:
    """The records under names that tell them apart: with that of the folder around them where these differ.

    Copies of a run's folder share the run's name; they go by their folders' names.
    """
    folders = [record.folder.resolve() for record in records]
    names = [record.name for record in records]
    if len(set(zip(names, (folder.parent for folder in folders), strict=True))) < len(set(folders)):
        names = [folder.name for folder in folders]
    if len({folder.parent for folder in folders}) > 1:
        names = [f"{folder.parent.name}/{name}" for folder, name in zip(folders, names, strict=True)]
    return [replace(record, name=name) for record, name in zip(records, names, strict=True)]


def _what_is_there(path: Path) -> str:
    """Why a path is not a run, and what to name instead."""
    if not path.exists():
        return f"{path}: no such file or folder. Name the folder of a run, such as outputs/quickstart"
    if not path.is_dir():
        return f"{path}: is a file. Name the folder of a run, or its {METRICS_FILE}"
    for above, what in ((path.parent, "a stage"), (path.parent.parent, "a checkpoint")):
        if (above / PLAN_FILE).exists():
            return f"{path}: is {what} of the run {above}: titan-cpt report {above}"
    runs = sorted({file.parent for pattern in ("*/plan.json", "*/*/plan.json") for file in path.glob(pattern)})
    if not runs:
        return f"{path}: is not a run's folder: neither it nor a folder below it has a {PLAN_FILE} or {METRICS_FILE}"
    more = f", and {len(runs) - _RUNS_LISTED} more" if len(runs) > _RUNS_LISTED else ""
    listed = " ".join(str(run) for run in runs[:_RUNS_LISTED])
    which = "the run" if len(runs) == 1 else f"one or several of the {len(runs)} runs"
    return f"{path}: is not a run; name {which} below it: {listed}{more}"


def _read_plan(run: Path) -> dict[str, Any]:
    path = run / PLAN_FILE
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("name", "fingerprint", "step_tokens") if key not in plan]
        missing += [key for stage in plan["stages"] for key in _STAGE_KEYS if key not in stage]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else f"damaged: {type(error).__name__}: {error}"
        raise DataError(f"{path}: cannot be read: {why}. It is written again when the run is trained again") from None
    if missing:
        raise DataError(
            f"{path}: damaged: {missing[0]!r} is missing. It is written again when the run is trained again"
        )
    return plan


def _told_by_lines(
    name: str, trains: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a run's lines say of its plan: stages and steps so far, tokens; not what is new in a stage."""
    steps: dict[str, int] = {}
    for line in [*trains, *validations]:
        steps[line["stage"]] = max(line["step"], steps.get(line["stage"], 0))
    counts = [(line.get("tokens"), line.get("run_step")) for line in trains]
    step_tokens = max((t // n for t, n in counts if isinstance(t, int) and isinstance(n, int) and n > 0), default=0)
    stages, total = [], 0
    for stage, count in steps.items():
        total += count * step_tokens
        told = {"name": stage, "steps": count, "tokens": count * step_tokens, "union_tokens": total}
        stages.append({**told, "new_datasets": [], "datasets": {}, "final_window": []})
    return {"name": name, "fingerprint": "", "step_tokens": step_tokens, "stages": stages}
