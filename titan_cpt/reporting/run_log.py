"""A run folder read back, finished or still training: its plan (plan.json) and its deduplicated log (metrics.jsonl)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from titan_cpt.common.metrics_file import read_metrics
from titan_cpt.common.planned_tokens import PlannedTokens
from titan_cpt.common.run_folder import METRICS_FILE, PLAN_FILE
from titan_cpt.errors import DataError, TitanError

_RUNS_LISTED = 10
_STAGE_KEYS = ("name", "steps", "tokens", "union_tokens", "new_datasets", "datasets", "final_window")
_WRITTEN_AGAIN = "The next `titan-cpt train` of the run writes it again"


@dataclass(frozen=True)
class RunLog:
    """The log of a run, deduplicated: after a resume the last line of each (stage, step) counts.

    Attributes:
        plan: contents of plan.json; if that is missing, the part of it that follows from metrics.jsonl.
        trains: lines of training steps, in the order of training.
        validations: lines of validation, in the order of training; one for each step and dataset.
        events: all events, oldest first, those of undone steps included.
        checkpoints: `checkpoint` events of steps that were not undone.
        problems: one sentence for each part of the folder that could not be read.
        renewed: validation lines of a stage's initial weights, measured again after the validation data had changed.
        registered: lines of metrics of other packages, in the order of training.
        label: the name that the user gave the run in this report; empty to use `name`.
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
    registered: Sequence[Mapping[str, Any]] = ()
    label: str = ""

    def comparable(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether two validation lines of a dataset were measured on the same validation data and windows.

        Lines of older versions have no `validation_id`. Two of them are comparable; one of them and a line with an id
        are comparable unless the run has a `validation_changed` event for the dataset.
        """
        identities = one.get("validation_id"), other.get("validation_id")
        if identities == (None, None) or None not in identities:
            return identities[0] == identities[1]
        changes = [event.get("datasets", ()) for event in self.events if event["name"] == "validation_changed"]
        return not any(one["dataset"] in datasets for datasets in changes)

    @cached_property
    def tokens(self) -> PlannedTokens:
        """The tokens of every step."""
        return PlannedTokens(self.plan)

    def tokens_at(self, stage: str, step: int) -> int:
        """Tokens trained on after `step` steps of a stage, those of earlier stages included."""
        return self.tokens.at(stage, step)

    def seconds_of(self, line: Mapping[str, Any]) -> float:
        """Duration of a training step, from its tokens and the throughput in its line; 0 if that is not recorded."""
        speed = line.get("tokens_per_s")
        if not isinstance(speed, int | float) or speed <= 0:
            return 0.0
        return self.tokens.stages[line["stage"]].of_step(line["step"]) / speed


def read_run(path: Path) -> RunLog:
    """Read a run folder.

    Args:
        path: a run folder, or a metrics.jsonl file.

    Raises:
        DataError: `path` is neither of these, or its plan.json cannot be read. Damaged lines of metrics.jsonl are
            skipped and reported in `RunLog.problems`.
    """
    run = path.parent if path.name == METRICS_FILE else path
    has_plan = (run / PLAN_FILE).exists()
    has_metrics = (run / METRICS_FILE).exists()
    if not has_plan and not has_metrics:
        raise DataError(explain_missing_run(path))
    plan = read_plan(run) if has_plan else {}
    if not has_metrics:
        return RunLog(plan["name"], run, plan, [], [], [], problems=[f"{run}: has no {METRICS_FILE}"])
    found = read_metrics(run, [stage["name"] for stage in plan["stages"]] if plan else [])
    plan = plan or _plan_from_lines(run.name, found.trains, found.validations)
    names = {stage["name"] for stage in plan["stages"]}
    trains, validations, checkpoints, renewed, registered = (
        [line for line in lines if line["stage"] in names]
        for lines in (found.trains, found.validations, found.checkpoints, found.renewed, found.registered)
    )
    problems = [*found.problems, *_nonfinite_losses(plan["name"], validations)]
    counted = trains, validations, found.events, checkpoints, problems, renewed, registered
    return RunLog(plan["name"], run, plan, *counted)


def _nonfinite_losses(name: str, validations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first validation loss that is not finite, and how many more there are."""
    problems = [
        f"{name}: the validation loss of {line['dataset']} after step {line['step']:,} of {line['stage']} is not finite"
        for line in validations
        if line["loss_nats_per_token"] is None
    ]
    return [*problems[:1], *([f"and {len(problems) - 1:,} more"] if len(problems) > 1 else [])]


def read_runs(paths: Sequence[Path], report_error: Callable[[str], None]) -> list[RunLog]:
    """Read several run folders; the message of one that cannot be read is passed to `report_error`.

    Args:
        paths: run folders; LABEL=FOLDER, if no file or folder has that name, gives the run of FOLDER a label.
    """
    runs: list[RunLog] = []
    for path in paths:
        label, _, folder = str(path).partition("=")
        labeled = bool(label and folder) and not path.exists()
        try:
            run = read_run(Path(folder) if labeled else path)
        except TitanError as error:
            report_error(str(error))
            continue
        if labeled and label in {each.label for each in runs}:
            report_error(f"{path}: another run has this label; choose another one")
            continue
        runs.append(replace(run, label=label) if labeled else run)
    return runs


def with_unique_names(runs: Sequence[RunLog]) -> list[RunLog]:
    """Rename runs that would have the same name in a table.

    Copies of a run folder share job.name and are called by their folder's name. Runs in several parent folders are
    called PARENT/NAME. A run with a label is called by it.
    """
    folders = [run.folder.resolve() for run in runs]
    names = [run.name for run in runs]
    if len(set(zip(names, (folder.parent for folder in folders), strict=True))) < len(set(folders)):
        names = [folder.name for folder in folders]
    if len({folder.parent for folder in folders}) > 1:
        names = [f"{folder.parent.name}/{name}" for folder, name in zip(folders, names, strict=True)]
    return [replace(run, name=run.label or name) for run, name in zip(runs, names, strict=True)]


def explain_missing_run(path: Path) -> str:
    """Why a path is not a run folder, and which path to give instead."""
    if not path.exists():
        return f"{path}: no such file or folder. Give a run folder, such as outputs/quickstart"
    if not path.is_dir():
        return f"{path}: is a file. Give a run folder, or its {METRICS_FILE}"
    for run, kind in ((path.parent, "a stage"), (path.parent.parent, "a checkpoint")):
        if (run / PLAN_FILE).exists():
            return f"{path}: is {kind} of the run {run}: give {run}"
    runs = sorted({file.parent for level in ("*", "*/*") for file in path.glob(f"{level}/{PLAN_FILE}")})
    if not runs:
        return f"{path}: is not a run folder: neither it nor a folder below it has a {PLAN_FILE} or {METRICS_FILE}"
    more = f", and {len(runs) - _RUNS_LISTED} more" if len(runs) > _RUNS_LISTED else ""
    listed = " ".join(str(run) for run in runs[:_RUNS_LISTED])
    which = "the run" if len(runs) == 1 else f"one or several of the {len(runs)} runs"
    return f"{path}: is not a run folder; give {which} below it: {listed}{more}"


def read_plan(run: Path) -> dict[str, Any]:
    """The plan.json of a run.

    Raises:
        DataError: it cannot be read, or a key that reports need is missing.
    """
    path = run / PLAN_FILE
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("name", "fingerprint", "step_tokens") if key not in plan]
        missing += [key for stage in plan["stages"] for key in _STAGE_KEYS if key not in stage]
        PlannedTokens({} if missing else plan)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else f"damaged ({error})"
        raise DataError(f"{path}: cannot be read: {why}. {_WRITTEN_AGAIN}") from None
    if missing:
        raise DataError(f"{path}: damaged: {missing[0]!r} is missing. {_WRITTEN_AGAIN}")
    return plan


def _plan_from_lines(
    name: str, trains: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The part of a plan that metrics.jsonl implies: stages, steps so far, tokens. Which data is new is unknown."""
    steps: dict[str, int] = {}
    for line in [*trains, *validations]:
        steps[line["stage"]] = max(line["step"], steps.get(line["stage"], 0))
    counts = [(line.get("tokens"), line.get("run_step")) for line in trains]
    step_tokens = max((t // n for t, n in counts if isinstance(t, int) and isinstance(n, int) and n > 0), default=0)
    stages = []
    union_tokens = 0
    for stage, count in steps.items():
        sizes = _batch_sizes([line for line in trains if line["stage"] == stage], union_tokens, step_tokens)
        known = {"name": stage, "steps": count, "seq_len": 1, "batch_sizes": sizes}
        tokens = PlannedTokens({"stages": [known]}).total
        union_tokens += tokens
        known |= {"tokens": tokens, "union_tokens": union_tokens}
        stages.append({**known, "new_datasets": [], "datasets": {}, "final_window": []})
    return {"name": name, "fingerprint": "", "step_tokens": step_tokens, "stages": stages}


def _batch_sizes(lines: Sequence[Mapping[str, Any]], before: int, step_tokens: int) -> list[list[int]]:
    """[first step, tokens of a step] of each phase of a stage, from the tokens in the lines of its steps.

    Args:
        before: tokens of earlier stages.
        step_tokens: for steps whose tokens are not recorded.
    """
    sizes: list[list[int]] = []
    done = 0
    for line in lines:
        tokens, step = line.get("tokens"), line["step"]
        if not isinstance(tokens, int) or tokens < before or step <= done:
            continue
        each, rest = divmod(tokens - before, step - done)
        sizes += [[done, each + 1], [done + rest, each]] if rest else [[done, each]]
        done, before = step, tokens
    merged = [size for index, size in enumerate(sizes) if not index or size[1] != sizes[index - 1][1]]
    return merged or [[0, step_tokens]]
