"""What a run learnt and forgot, read from its folder (plan.json and metrics.jsonl), finished or still training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from titan_cpt.reporting.run_log import RunLog, read_run


def summarize(run: Path) -> dict[str, Any]:
    """Per stage: the losses on every dataset before and after, forgetting, adaptation, tokens by dataset, seconds.

    Losses are in nats per token. "after" is the last measurement of a stage, at its step `measured_at`. Forgetting is
    given for datasets that are not new in the stage, as after - left_at; adaptation for those that are. `tokens` are
    those of the whole stage by its plan, `trained_tokens` those of the steps taken. `seconds` are of `timed_steps`
    steps, which are fewer than `steps_done` where the record lacks lines.

    Raises:
        DataError: the folder is not a run's, or its plan cannot be read.
    """
    return summarize_log(read_run(run))


def summarize_log(record: RunLog) -> dict[str, Any]:
    """As `summarize`, of a record that was read already."""
    stages = [_stage_summary(record, stage) for stage in record.plan["stages"]]
    return {
        "name": record.name,
        "folder": str(record.folder),
        "fingerprint": record.plan["fingerprint"],
        "stages": stages,
        "problems": list(record.problems),
    }


def _stage_summary(record: RunLog, stage: Mapping[str, Any]) -> dict[str, Any]:
    name, new = stage["name"], stage["new_datasets"]
    trains, lines, saved = (
        [line for line in of if line["stage"] == name] for of in (record.trains, record.validations, record.checkpoints)
    )
    measured = {(line["step"], line["dataset"]): line for line in lines if line["loss_nats_per_token"] is not None}
    measured_at = max((step for step, _ in measured), default=None)
    done = max((line["step"] for line in [*trains, *lines, *saved]), default=0)
    after = {d: line for (step, d), line in measured.items() if step == measured_at}
    before = _before(record, name, measured, after)
    window = {dataset: _final_loss(record, measured, dataset, stage["final_window"]) for dataset in after}
    forgetting = {d: line.get("forgetting_nats_per_token") for d, line in after.items()}
    known = {d: value for d, value in forgetting.items() if value is not None}
    speeds = [line["tokens_per_s"] for line in trains if line.get("tokens_per_s")]
    return {
        "name": name,
        "steps": stage["steps"],
        "steps_done": done,
        "is_begun": bool(trains or lines or saved),
        "is_done": done >= stage["steps"] and (measured_at == stage["steps"] or not record.validations),
        "measured_at": measured_at,
        "before": {d: line["loss_nats_per_token"] for d, line in before.items()},
        "not_comparable": sorted(d for d in after if d in before and not record.comparable(before[d], after[d])),
        "validation_ids": {d: line.get("validation_id") for d, line in after.items()},
        "after": {d: line["loss_nats_per_token"] for d, line in after.items()},
        "bits_per_byte": {
            d: line["bits_per_byte"] for d, line in after.items() if line.get("bits_per_byte") is not None
        },
        "final_loss": {d: loss for d, loss in window.items() if loss is not None},
        "forgetting": known,
        "left_at": {d: after[d]["loss_nats_per_token"] - value for d, value in known.items()},
        "adaptation": {d: line["loss_nats_per_token"] for d, line in after.items() if d.partition(".")[0] in new},
        "tokens": {d: use["tokens"] for d, use in stage["datasets"].items()},
        "replayed_tokens": {d: use["replayed_tokens"] for d, use in stage["datasets"].items()},
        "trained_tokens": done * record.plan["step_tokens"],
        "seconds": sum(record.plan["step_tokens"] / speed for speed in speeds),
        "timed_steps": len(speeds),
    }


def _before(
    record: RunLog,
    stage: str,
    measured: Mapping[tuple[int, str], Mapping[str, Any]],
    after: Mapping[str, Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
    """Measurements of a stage's first weights; where these were made again for what `after` measures, those."""
    before = {dataset: line for (step, dataset), line in measured.items() if step == 0}
    for line in record.renewed:
        dataset = line["dataset"]
        if line["stage"] == stage and dataset in before and line["loss_nats_per_token"] is not None:
            last = after.get(dataset, before[dataset])
            if record.comparable(line, last) and not record.comparable(before[dataset], last):
                before[dataset] = line
    return before


def _final_loss(
    record: RunLog, measured: Mapping[tuple[int, str], Mapping[str, Any]], dataset: str, window: Sequence[int]
) -> float | None:
    """The paper's final loss, where the run took all its samples of the same validation data."""
    lines = [line for step in window if (line := measured.get((step, dataset))) is not None]
    losses = [line["loss_nats_per_token"] for line in lines if record.comparable(line, lines[-1])]
    return sum(losses) / len(losses) if losses and len(losses) == len(window) else None


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """A table for each stage that has begun, a line for each that has not."""
    for stage in summary["stages"]:
        if not stage["is_begun"]:
            text = f"{summary['name']}, stage {stage['name']}: not begun, {stage['steps']:,} steps planned"
            console.print(escape(text), style="bold", highlight=False)
            continue
        of_plan = "" if stage["steps_done"] >= stage["steps"] else "planned "
        table = Table(title=escape(_title(summary, stage)), title_justify="left", header_style="bold")
        table.add_column("dataset")
        columns = (f"{of_plan}tokens", f"{of_plan}replay", "loss before", "left at", "after", "forgetting")
        for column in (*columns, "bits per byte"):
            table.add_column(column, justify="right")
        for dataset in sorted({*stage["before"], *stage["after"], *stage["tokens"]}):
            table.add_row(dataset, *_row(stage, dataset), style="bold" if dataset in stage["adaptation"] else "")
        console.print(table)
    console.print(
        "losses in nats per token; left at: the loss at which the weights left the stage that trained on that dataset; "
        "forgetting = after - left at; bold: the stage's own data, whose loss after it is the adaptation"
    )
    if any(stage["not_comparable"] for stage in summary["stages"]):
        console.print("* measured on other validation data or windows than the loss after it: not comparable")
    for problem in summary["problems"]:
        console.print(f"[yellow]note[/] {escape(problem)}", highlight=False)


def _title(summary: Mapping[str, Any], stage: Mapping[str, Any]) -> str:
    done, at = stage["steps_done"], stage["measured_at"]
    parts = [f"{stage['steps']:,} steps"]
    if done < stage["steps"]:
        parts.append(f"{done:,} done")
    if at is not None and at != done:
        parts.append(f"losses after step {at:,}")
    seconds = f"{stage['seconds']:.0f} s"
    if stage["timed_steps"] < done:
        seconds = f"{seconds} for the {stage['timed_steps']:,} steps that are recorded" if stage["timed_steps"] else ""
    parts.append(seconds or "duration not recorded")
    return f"{summary['name']}, stage {stage['name']} ({', '.join(parts)})"


def _row(stage: Mapping[str, Any], dataset: str) -> list[str]:
    forms = {"tokens": ",", "replayed_tokens": ",", "before": ".4f", "left_at": ".4f", "after": ".4f"}
    forms |= {"forgetting": "+.4f", "bits_per_byte": ".3f"}
    values = [(stage[key].get(dataset), form) for key, form in forms.items()]
    cells = ["" if value is None else format(value, form) for value, form in values]
    if dataset in stage["not_comparable"]:
        cells[list(forms).index("before")] += " *"
    return cells
