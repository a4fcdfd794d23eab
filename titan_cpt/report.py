"""What a run learnt and forgot, read from its folder alone (plan.json and metrics.jsonl), finished or still going."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from titan_cpt.errors import DataError
from titan_cpt.metrics import FILE_NAME, read_record


@dataclass(frozen=True)
class Record:
    """What a run wrote down, each thing once: of what a resume measured again, the last.

    Attributes:
        plan: plan.json, or what metrics.jsonl tells of it where that is all there is.
        trains: lines of steps, in the order of the run.
        validations: lines of measurements, likewise.
        events: all of them, in the order of time.
    """

    name: str
    folder: Path
    plan: Mapping[str, Any]
    trains: Sequence[Mapping[str, Any]]
    validations: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]

    @property
    def total_tokens(self) -> int:
        """Tokens of all stages to their ends."""
        return int(sum(stage["steps"] for stage in self.plan["stages"]) * self.plan["step_tokens"])

    def tokens_at(self, stage: str, step: int) -> int:
        """Tokens that the run had trained on after so many steps of a stage, earlier stages included."""
        before = 0
        for each in self.plan["stages"]:
            if each["name"] == stage:
                break
            before += each["steps"]
        return int((before + step) * self.plan["step_tokens"])


def read_run(path: Path) -> Record:
    """The record of a run's folder, or of a metrics.jsonl alone; of a run that is still going, as far as it has come.

    Raises:
        DataError: it is neither, or damaged.
    """
    run = path.parent if path.name == FILE_NAME else path
    trains: dict[tuple[str, int], dict[str, Any]] = {}
    validations: dict[tuple[str, int, str], dict[str, Any]] = {}
    events: list[dict[str, Any]] = []
    plan = _read_plan(run) if not (run / FILE_NAME).exists() or (run / "plan.json").exists() else {}
    for line in read_record(run):
        if line["kind"] == "validation":
            validations[line["stage"], line["step"], line["dataset"]] = line
        elif line["kind"] == "train":
            trains[line["stage"], line["step"]] = line
        elif line["kind"] == "event":
            events.append(line)
    plan = plan or _told_by_lines(run.name, [*trains.values()], [*validations.values()])
    places = {stage["name"]: place for place, stage in enumerate(plan["stages"])}

    def in_order(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        mine = (line for line in lines if line["stage"] in places)
        return sorted(mine, key=lambda line: (places[line["stage"]], line["step"]))

    return Record(plan["name"], run, plan, in_order(trains.values()), in_order(validations.values()), events)


def labelled(records: Sequence[Record]) -> list[Record]:
    """The records under names that tell them apart: with that of the folder around them where these differ."""
    if len({record.folder.resolve().parent for record in records}) == 1:
        return list(records)
    return [replace(record, name=f"{record.folder.resolve().parent.name}/{record.name}") for record in records]


def _read_plan(run: Path) -> dict[str, Any]:
    path = run / "plan.json"
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}. Name the folder of a run") from None
    return plan


def _told_by_lines(name: str, trains: list[dict[str, Any]], validations: list[dict[str, Any]]) -> dict[str, Any]:
    """What of a plan its run's lines tell: stages and steps so far, tokens; not what is new in a stage."""
    steps: dict[str, int] = {}
    for line in [*trains, *validations]:
        steps[line["stage"]] = max(line["step"], steps.get(line["stage"], 0))
    step_tokens = max((line["tokens"] // line["run_step"] for line in trains), default=0)
    stages, total = [], 0
    for stage, count in steps.items():
        total += count * step_tokens
        told = {"name": stage, "steps": count, "tokens": count * step_tokens, "union_tokens": total}
        stages.append({**told, "new_datasets": [], "datasets": {}, "final_window": []})
    return {"name": name, "fingerprint": "", "step_tokens": step_tokens, "stages": stages}


def summarise(run: Path) -> dict[str, Any]:
    """Per stage: the losses on every dataset before and after, forgetting, adaptation, tokens by dataset, seconds.

    Losses are in nats per token. "After" is the last measurement of a stage that is still going, with its step.
    Forgetting is told of datasets that are not new in the stage, adaptation of those that are.

    Raises:
        DataError: the folder is not a run's, or its record is damaged.
    """
    return summary_of(read_run(run))


def summary_of(record: Record) -> dict[str, Any]:
    """As `summarise`, of a record that was read already."""
    plan = record.plan
    validations = {(line["stage"], line["step"], line["dataset"]): dict(line) for line in record.validations}
    seconds = {
        (line["stage"], line["step"]): plan["step_tokens"] / line["tokens_per_s"]
        for line in record.trains
        if line["tokens_per_s"]
    }
    stages = [_stage_summary(stage, validations, seconds) for stage in plan["stages"]]
    return {
        "name": record.name,
        "folder": str(record.folder),
        "fingerprint": plan["fingerprint"],
        "stages": stages,
    }


def _stage_summary(
    stage: dict[str, Any],
    validations: dict[tuple[str, int, str], dict[str, Any]],
    seconds: dict[tuple[str, int], float],
) -> dict[str, Any]:
    name, new = stage["name"], stage["new_datasets"]
    mine = {(step, dataset): line for (of, step, dataset), line in validations.items() if of == name}
    last = max((step for step, _ in mine), default=0)
    after = {dataset: line for (step, dataset), line in sorted(mine.items()) if step == last}
    window = {dataset: _final_loss(mine, dataset, stage["final_window"]) for dataset in after}
    forgetting = {d: line["forgetting_nats_per_token"] for d, line in after.items()}
    return {
        "name": name,
        "steps": stage["steps"],
        "steps_done": last,
        "before": {d: line["loss_nats_per_token"] for (step, d), line in sorted(mine.items()) if step == 0},
        "after": {d: line["loss_nats_per_token"] for d, line in after.items()},
        "bits_per_byte": {d: line["bits_per_byte"] for d, line in after.items()},
        "final_loss": {d: loss for d, loss in window.items() if loss is not None},
        "forgetting": {d: value for d, value in forgetting.items() if value is not None},
        "adaptation": {d: line["loss_nats_per_token"] for d, line in after.items() if d.partition(".")[0] in new},
        "tokens": {d: use["tokens"] for d, use in stage["datasets"].items()},
        "replayed_tokens": {d: use["replayed_tokens"] for d, use in stage["datasets"].items()},
        "seconds": sum(value for (of, _), value in seconds.items() if of == name),
    }


def _final_loss(mine: dict[tuple[int, str], dict[str, Any]], dataset: str, window: list[int]) -> float | None:
    """The paper's final loss, where the run took its samples and has come to its end."""
    lines = [mine.get((step, dataset)) for step in window]
    losses = [line["loss_nats_per_token"] for line in lines if line is not None]
    return sum(losses) / len(losses) if losses and len(losses) == len(window) else None


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """A table for each stage."""
    for stage in summary["stages"]:
        going = "" if stage["steps_done"] == stage["steps"] else f", {stage['steps_done']:,} done"
        size = f"{stage['steps']:,} steps{going}, {stage['seconds']:.0f} s"
        table = Table(
            title=f"{summary['name']}, stage {stage['name']} ({size})",
            title_justify="left",
            header_style="bold",
        )
        table.add_column("dataset")
        for column in ("tokens", "of them replayed", "loss before", "after", "forgetting", "bits per byte"):
            table.add_column(column, justify="right")
        for dataset in sorted({*stage["before"], *stage["after"], *stage["tokens"]}):
            table.add_row(dataset, *_row(stage, dataset), style="bold" if dataset in stage["adaptation"] else "")
        console.print(table)
    console.print("losses in nats per token; bold: the stage's new data, whose loss after it is the adaptation")


def _row(stage: dict[str, Any], dataset: str) -> list[str]:
    def number(key: str, form: str) -> str:
        value = stage[key].get(dataset)
        return "" if value is None else format(value, form)

    return [
        number("tokens", ","),
        number("replayed_tokens", ","),
        number("before", ".4f"),
        number("after", ".4f"),
        number("forgetting", "+.4f"),
        number("bits_per_byte", ".3f"),
    ]
