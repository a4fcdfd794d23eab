"""What a run learned and forgot: losses per stage and dataset, computed from its folder and printed as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.run_folder import SUMMARY_FILE
from titan_cpt.reporting.number_texts import token_text
from titan_cpt.reporting.run_log import RunLog, read_run

_LEGEND = (
    "validation losses in nats per token; left at: the loss when training on that dataset last ended; forgetting = "
    "after - left at; bold: new data of the stage, whose loss after it is the adaptation"
)


def summarize(folder: Path) -> dict[str, Any]:
    """The summary of a run folder, as in summary.json: for each stage the losses, forgetting, tokens and seconds.

    Losses are in nats per token. Keys of a stage:
        before, after: loss of each dataset at step 0 and at the last validation, which is that of step `measured_at`.
        bits_per_byte_before, bits_per_byte: the same in bits per byte, which compare across tokenizers.
        has_new_rows: whether the stage begins with rows for new tokens, as its plan says.
        left_at, forgetting: of datasets that are not new in the stage: the loss when training on the dataset last
            ended, and after - left_at.
        adaptation: loss after the stage of each dataset that is new in it.
        tokens, replayed_tokens: planned tokens of each dataset. trained_tokens: those of the steps done.
        metrics: the last values of metrics of other packages, by metric and name; only if the stage has some.
        seconds: duration of `timed_steps` steps, which had `timed_tokens`; fewer than `steps_done` if lines of
            metrics.jsonl are missing.

    Raises:
        DataError: `folder` is not a run folder, or its plan.json cannot be read.
    """
    return summarize_log(read_run(folder))


def write_summary(folder: Path) -> None:
    """Write a run's summary.json: losses, forgetting and adaptation of all stages so far."""
    write_text_atomically(folder / SUMMARY_FILE, json.dumps(summarize(folder), indent=1))


def summarize_log(run: RunLog) -> dict[str, Any]:
    """As `summarize`, of a run that has been read."""
    return {
        "name": run.name,
        "folder": str(run.folder),
        "fingerprint": run.plan["fingerprint"],
        "stages": [_stage_summary(run, stage) for stage in run.plan["stages"]],
        "problems": list(run.problems),
    }


def _stage_summary(run: RunLog, stage: Mapping[str, Any]) -> dict[str, Any]:
    name = stage["name"]
    trains, validations, checkpoints = (
        [line for line in lines if line["stage"] == name] for lines in (run.trains, run.validations, run.checkpoints)
    )
    done = max((line["step"] for line in [*trains, *validations, *checkpoints]), default=0)
    timed = [line for line in trains if line.get("tokens_per_s")]
    tokens = run.tokens.stages[name]
    losses, measured_at = _losses(run, stage, validations)
    return {
        "name": name,
        "has_new_rows": stage.get("new_rows") is not None,
        "steps": stage["steps"],
        "steps_done": done,
        "is_begun": bool(trains or validations or checkpoints),
        "is_done": done >= stage["steps"] and (measured_at == stage["steps"] or not run.validations),
        "measured_at": measured_at,
        **losses,
        **_registered_metrics(run, name),
        "tokens": {d: use["tokens"] for d, use in stage["datasets"].items()},
        "replayed_tokens": {d: use["replayed_tokens"] for d, use in stage["datasets"].items()},
        "trained_tokens": tokens.until(done),
        "seconds": sum(run.seconds_of(line) for line in timed),
        "timed_steps": len(timed),
        "timed_tokens": sum(tokens.of_step(line["step"]) for line in timed),
    }


def _registered_metrics(run: RunLog, stage: str) -> dict[str, Any]:
    """{"metrics": {metric: {name: last value}}}; empty if the stage has none."""
    last: dict[str, dict[str, float | None]] = {}
    for line in run.registered:
        if line["stage"] == stage:
            last.setdefault(line["metric"], {})[line["name"]] = line["value"]
    return {"metrics": last} if last else {}


def _losses(
    run: RunLog, stage: Mapping[str, Any], validations: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], int | None]:
    """The keys of a stage's summary that concern losses, and the step of the last validation."""
    measured = {
        (line["step"], line["dataset"]): line for line in validations if line["loss_nats_per_token"] is not None
    }
    measured_at = max((step for step, _ in measured), default=None)
    after = {dataset: line for (step, dataset), line in measured.items() if step == measured_at}
    before = _before(run, stage["name"], measured, after)
    final = {dataset: _final_loss(run, measured, dataset, stage["final_window"]) for dataset in after}
    forgetting = {d: line.get("forgetting_nats_per_token") for d, line in after.items()}
    known = {d: value for d, value in forgetting.items() if value is not None}
    losses = {
        "before": {d: line["loss_nats_per_token"] for d, line in before.items()},
        "not_comparable": sorted(d for d in after if d in before and not run.comparable(before[d], after[d])),
        "validation_ids": {d: line.get("validation_id") for d, line in after.items()},
        "after": {d: line["loss_nats_per_token"] for d, line in after.items()},
        "bits_per_byte": {
            d: line["bits_per_byte"] for d, line in after.items() if line.get("bits_per_byte") is not None
        },
        "bits_per_byte_before": {
            d: line["bits_per_byte"] for d, line in before.items() if line.get("bits_per_byte") is not None
        },
        "final_loss": {d: loss for d, loss in final.items() if loss is not None},
        "forgetting": known,
        "left_at": {d: after[d]["loss_nats_per_token"] - value for d, value in known.items()},
        "adaptation": {
            d: line["loss_nats_per_token"]
            for d, line in after.items()
            if "@" not in d and d.partition(".")[0] in stage["new_datasets"]
        },
    }
    return losses, measured_at


def _before(
    run: RunLog,
    stage: str,
    measured: Mapping[tuple[int, str], Mapping[str, Any]],
    after: Mapping[str, Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
    """Validation lines of a stage's initial weights.

    If they were measured again on the validation data of `after`, these lines replace those of step 0.
    """
    before = {dataset: line for (step, dataset), line in measured.items() if step == 0}
    for line in run.renewed:
        dataset = line["dataset"]
        if line["stage"] == stage and dataset in before and line["loss_nats_per_token"] is not None:
            last = after.get(dataset, before[dataset])
            if run.comparable(line, last) and not run.comparable(before[dataset], last):
                before[dataset] = line
    return before


def _final_loss(
    run: RunLog, measured: Mapping[tuple[int, str], Mapping[str, Any]], dataset: str, window: Sequence[int]
) -> float | None:
    """Mean loss over the steps of the final window; None if one is missing or had other validation data.

    Source: Ibrahim et al. 2024, arXiv:2403.08763: the mean over the last 100 steps, sampled every 10.
    """
    lines = [line for step in window if (line := measured.get((step, dataset))) is not None]
    losses = [line["loss_nats_per_token"] for line in lines if run.comparable(line, lines[-1])]
    return sum(losses) / len(losses) if losses and len(losses) == len(window) else None


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print a table for each stage that has begun, and a line for each that has not."""
    for stage in summary["stages"]:
        if stage["is_begun"]:
            console.print(narrowed(partial(_table, summary, stage), console))
        else:
            text = f"{summary['name']}, stage {stage['name']}: not begun, {stage['steps']:,} steps planned"
            console.print(escape(text), style="bold", highlight=False)
    console.print(_LEGEND)
    for stage in summary["stages"]:
        if stage["has_new_rows"] and stage["bits_per_byte_before"]:
            console.print(_new_rows_text(stage), highlight=False)
    if any(stage["not_comparable"] for stage in summary["stages"]):
        console.print("* measured on other validation data or windows than the loss after it: not comparable")
    for problem in summary["problems"]:
        console.print(f"[yellow]note[/] {escape(problem)}", highlight=False)


def _new_rows_text(stage: Mapping[str, Any]) -> str:
    bits = ", ".join(f"{name} {value:.3f}" for name, value in sorted(stage["bits_per_byte_before"].items()))
    return escape(
        f"new tokens since stage {stage['name']}: losses in nats per token do not compare with those of the original "
        f"tokenizer, bits per byte do; at step 0 of the stage: {bits}"
    )


def narrowed(make_table: Callable[[bool], Table], console: Console) -> Table:
    """The table without borders and with short numbers and headings, if the other one is wider than the console."""
    table = make_table(False)
    if table_width(table, console) <= console.width:
        return table
    table = make_table(True)
    table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 1, 0, 0), False
    table.show_edge = False
    return table


def table_width(table: Table, console: Console) -> int:
    """The columns that a table needs, however wide the console is."""
    return console.measure(table, options=console.options.update(width=10_000)).maximum


def _table(summary: Mapping[str, Any], stage: Mapping[str, Any], narrow: bool) -> Table:
    planned = "" if stage["steps_done"] >= stage["steps"] else "planned "
    table = Table(title=escape(_title(summary, stage)), title_justify="left", header_style="bold")
    table.add_column("dataset", min_width=8, overflow="fold")
    columns = (f"{planned}tokens", f"{planned}replay", "loss before", "left at", "after", "forgetting", "bits per byte")
    for column in columns:
        head = "\n".join(column.rsplit(" ", 1)) if narrow and len(column) > 8 else column
        table.add_column(head, justify="right", no_wrap=True)
    for dataset in sorted({*stage["before"], *stage["after"], *stage["tokens"]}):
        style = "bold" if dataset in stage["adaptation"] else ""
        table.add_row(escape(dataset), *_cells(stage, dataset, narrow=narrow), style=style)
    return table


def _title(summary: Mapping[str, Any], stage: Mapping[str, Any]) -> str:
    done = stage["steps_done"]
    measured_at = stage["measured_at"]
    parts = [f"{stage['steps']:,} steps"]
    if done < stage["steps"]:
        parts.append(f"{done:,} done")
    if measured_at is not None and measured_at != done:
        parts.append(f"losses after step {measured_at:,}")
    if stage["timed_steps"] == 0 and done > 0:
        parts.append("duration not recorded")
    elif stage["timed_steps"] < done:
        parts.append(f"{stage['seconds']:.0f} s for the {stage['timed_steps']:,} steps that are recorded")
    else:
        parts.append(f"{stage['seconds']:.0f} s")
    return f"{summary['name']}, stage {stage['name']} ({', '.join(parts)})"


def _cells(stage: Mapping[str, Any], dataset: str, *, narrow: bool) -> list[str]:
    formats = {"tokens": ",", "replayed_tokens": ",", "before": ".4f", "left_at": ".4f", "after": ".4f"}
    formats |= {"forgetting": "+.4f", "bits_per_byte": ".3f"}
    values = [(stage[key].get(dataset), form) for key, form in formats.items()]
    cells = ["" if value is None else format(value, form) for value, form in values]
    if narrow:
        cells[:2] = ["" if value is None else token_text(value) for value, _ in values[:2]]
    if dataset in stage["not_comparable"]:
        cells[list(formats).index("before")] += " *"
    return cells
