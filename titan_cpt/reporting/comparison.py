"""Several runs side by side: a row for each, with what its last stage learnt, what it forgot and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from titan_cpt.reporting.run_log import RunLog, with_unique_names
from titan_cpt.reporting.summary import print_summary, summarize_log


@dataclass(frozen=True)
class ComparisonRow:
    """One run at the end of its last stage that has begun, or where it stands; losses in nats per token.

    Attributes:
        validation_ids: what the losses were measured on; losses of two ids are not comparable.
        is_done: whether that is the end of its last stage.
        losses: of every dataset: the final window's mean where the run took it, else the last measurement.
        average: the plain mean over the datasets that any of the stages trains on; None before any is measured.
        forgetting: of every dataset that is not new in the stage, against when the weights had just left it.
        adaptation: the mean loss on the stage's new data; None where there is none.
        tokens: trained on so far, in all stages.
        update_share: tokens of the last stage over those of the run up to its end: its cost relative to training again.
    """

    name: str
    stage: str
    is_done: bool
    losses: Mapping[str, float]
    average: float | None
    forgetting: Mapping[str, float]
    adaptation: float | None
    tokens: int
    update_share: float
    validation_ids: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def mean_forgetting(self) -> float | None:
        """The plain mean over the datasets that can be forgotten."""
        return mean(self.forgetting.values()) if self.forgetting else None


def compare(records: Sequence[RunLog]) -> list[ComparisonRow]:
    """A row for each run, in the order given; averages over the datasets that any of them trains on."""
    trained = {name for record in records for stage in record.plan["stages"] for name in stage["datasets"]}
    return [_row(record, trained) for record in records]


def _row(record: RunLog, trained: set[str]) -> ComparisonRow:
    plan, stages = record.plan, summarize_log(record)["stages"]
    begun = [place for place, stage in enumerate(stages) if stage["is_begun"]]
    place = begun[-1] if begun else 0
    stage, planned = stages[place], plan["stages"][place]
    losses = {**stage["after"], **stage["final_loss"]}
    counted = [loss for name, loss in losses.items() if name in trained] or [
        loss for name, loss in losses.items() if "." not in name
    ]
    # The difference that the final window shows is the one between its mean and the loss before.
    since = {name: value - stage["after"][name] for name, value in stage["forgetting"].items()}
    adaptation = [losses[name] for name in stage["adaptation"] if "." not in name or name in trained]
    return ComparisonRow(
        name=record.name,
        stage=stage["name"],
        is_done=stage["is_done"] and place == len(stages) - 1,
        losses=losses,
        average=mean(counted) if counted else None,
        forgetting={name: losses[name] + minus for name, minus in since.items() if "." not in name},
        adaptation=mean(adaptation) if adaptation else None,
        tokens=record.tokens_at(stage["name"], stage["steps_done"]),
        update_share=planned["tokens"] / planned["union_tokens"] if planned["union_tokens"] else 1.0,
        validation_ids=stage["validation_ids"],
    )


def incomparable_datasets(rows: Sequence[ComparisonRow]) -> list[str]:
    """The datasets that the rows did not all measure on the same validation data and windows, as far as is recorded."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, identity in row.validation_ids.items():
            if identity is not None:
                found.setdefault(name, set()).add(identity)
    return sorted(name for name, identities in found.items() if len(identities) > 1)


def print_runs(records: Sequence[RunLog], console: Console) -> None:
    """The tables of each run, and of several a line for each beside the others."""
    records = with_unique_names(records)
    for record in records:
        print_summary(summarize_log(record), console)
    if len(records) > 1:
        print_comparison(compare(records), console)


def print_comparison(
    rows: Sequence[ComparisonRow], console: Console, messages: Mapping[str, str] | None = None
) -> None:
    """A line for each run; `messages` are those of runs that broke, by name, whether or not they have a row."""
    messages = messages or {}
    datasets = sorted({name for row in rows for name in row.losses if "." not in name})
    table = Table(title="at the end of the last stage", title_justify="left", header_style="bold")
    table.add_column("run")
    for column in (*datasets, "AVG", "forgetting", "compute", "state"):
        table.add_column(column, justify="left" if column == "state" else "right")
    for row in rows:
        losses = [_number(row.losses.get(name), ".4f") for name in datasets]
        state = "failed" if row.name in messages else "done" if row.is_done else f"in {row.stage}"
        shown = [_number(row.average, ".4f"), _number(row.mean_forgetting, "+.4f"), f"{row.update_share:.2f}x", state]
        table.add_row(escape(row.name), *losses, *shown)
    for name in messages:
        if name not in {row.name for row in rows}:
            table.add_row(escape(name), *[""] * (len(datasets) + 3), "failed")
    console.print(table)
    console.print(
        "losses in nats per token on held-out text; AVG: mean over the datasets that are trained on; compute: of the "
        "last stage against training again on everything"
    )
    if different := incomparable_datasets(rows):
        console.print(
            f"not comparable, measured on different validation data or windows: {escape(', '.join(different))}"
        )
    for name, message in messages.items():
        console.print(f"[bold]{escape(name)}[/]: {escape(message)}", highlight=False)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
