"""Runs side by side: one row per run with the losses, forgetting, adaptation and relative cost of its last stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from titan_cpt.common.weights.named_weights import AVERAGE_SUFFIX, split_average
from titan_cpt.reporting.run_log import RunLog, with_unique_names
from titan_cpt.reporting.summary import narrowed, print_summary, summarize_log, table_width

T = TypeVar("T")


@dataclass(frozen=True)
class ComparisonRow:
    """One run at the last validation of its last stage that has begun; losses in nats per token.

    Attributes:
        is_done: every stage is trained and validated.
        losses: of each dataset: the mean over the final window if the run has it, else the last validation loss. Those
            of an average of the weights are called NAME@average.
        average: mean of `losses` over the datasets that a stage of any run trains on; None before the first validation.
        forgetting: of each dataset that is not new in the stage: its loss minus the loss when training on it ended.
        adaptation: mean loss on the datasets that are new in the stage; None if there is none.
        tokens: trained on so far, in all stages.
        update_share: tokens of the last stage / tokens of all stages up to it: its cost relative to training from
            scratch on all data.
        validation_ids: identity of the validation data and windows; losses with different ids are not comparable.
        averaged, adapted_to: the datasets over which `average` and `adaptation` are means.
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
    averaged: Sequence[str] = ()
    adapted_to: Sequence[str] = ()

    @property
    def mean_forgetting(self) -> float | None:
        """Mean forgetting over the old datasets; None if all data is new."""
        return mean(self.forgetting.values()) if self.forgetting else None


def compare(runs: Sequence[RunLog]) -> list[ComparisonRow]:
    """One row per run, in the given order."""
    trained = {name for run in runs for stage in run.plan["stages"] for name in stage["datasets"]}
    return [_row(run, trained) for run in runs]


def _row(run: RunLog, trained: set[str]) -> ComparisonRow:
    stages = summarize_log(run)["stages"]
    index = max((index for index, stage in enumerate(stages) if stage["is_begun"]), default=0)
    stage = stages[index]
    planned = run.plan["stages"][index]
    losses = {**stage["after"], **stage["final_loss"]}
    counted = [name for name in losses if name in trained] or [name for name in losses if _is_whole(name)]
    # Forgetting of the final window: its mean loss minus the loss when training on the dataset ended.
    minus_left_at = {name: value - stage["after"][name] for name, value in stage["forgetting"].items()}
    adaptation = [name for name in stage["adaptation"] if "." not in name or name in trained]
    return ComparisonRow(
        name=run.name,
        stage=stage["name"],
        is_done=stage["is_done"] and index == len(stages) - 1,
        losses=losses,
        average=mean(losses[name] for name in counted) if counted else None,
        forgetting={name: losses[name] + minus for name, minus in minus_left_at.items() if _is_whole(name)},
        adaptation=mean(losses[name] for name in adaptation) if adaptation else None,
        tokens=run.tokens_at(stage["name"], stage["steps_done"]),
        update_share=planned["tokens"] / planned["union_tokens"] if planned["union_tokens"] else 1.0,
        validation_ids=stage["validation_ids"],
        averaged=sorted(counted),
        adapted_to=sorted(adaptation),
    )


def _is_whole(name: str) -> bool:
    """Whether a loss is of a whole dataset on the windows of the run: not of a domain, nor of a stage's own length."""
    return not {".", "@"} & set(name)


def with_averages(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """The rows without losses of averages; each is followed by a row of its average, RUN@average, if it has one."""
    found = []
    for row in rows:
        of_weights, of_average = _by_weights(row.losses)
        ids, ids_of_average = _by_weights(row.validation_ids)
        found.append(replace(row, losses=of_weights, validation_ids=ids))
        if of_average:
            # Both forget what the weights knew when training on the dataset ended: forgetting = loss - left at.
            left_at = {name: row.losses[name] - value for name, value in row.forgetting.items()}
            average = replace(
                row,
                name=f"{row.name}{AVERAGE_SUFFIX}",
                losses=of_average,
                average=_mean_over(row.averaged, of_average),
                forgetting={name: of_average[name] - value for name, value in left_at.items() if name in of_average},
                adaptation=_mean_over(row.adapted_to, of_average),
                validation_ids=ids_of_average,
            )
            found.append(average)
    return found


def _by_weights(values: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """The values of the weights themselves and those of their average, by the dataset's label."""
    found: tuple[dict[str, T], dict[str, T]] = {}, {}
    for label, value in values.items():
        name, is_average = split_average(label)
        found[is_average][name] = value
    return found


def _mean_over(names: Sequence[str], losses: Mapping[str, float]) -> float | None:
    """The mean loss; None without names, or if one is missing."""
    return mean(losses[name] for name in names) if names and all(name in losses for name in names) else None


def incomparable_datasets(rows: Sequence[ComparisonRow]) -> list[str]:
    """Datasets whose losses were measured on different validation data or windows; rows without an id are ignored."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, identity in row.validation_ids.items():
            if identity is not None:
                found.setdefault(name, set()).add(identity)
    return sorted(name for name, identities in found.items() if len(identities) > 1)


def means_over_different_datasets(rows: Sequence[ComparisonRow]) -> list[str]:
    """Which of AVG, forgetting and adaptation have other datasets in some rows, so that no row has the lowest."""
    sets = {
        "AVG": {tuple(row.averaged) for row in rows if row.average is not None},
        "forgetting": {tuple(sorted(row.forgetting)) for row in rows if row.forgetting},
        "adaptation": {tuple(row.adapted_to) for row in rows if row.adaptation is not None and row.forgetting},
    }
    return [name for name, different in sets.items() if len(different) > 1]


def print_runs(runs: Sequence[RunLog], console: Console) -> None:
    """Print the tables of each run and, for several runs, a comparison."""
    runs = with_unique_names(runs)
    for run in runs:
        print_summary(summarize_log(run), console)
    if len(runs) > 1:
        print_comparison(compare(runs), console)


def print_comparison(
    rows: Sequence[ComparisonRow], console: Console, messages: Mapping[str, str] | None = None
) -> None:
    """Print one line per run.

    Args:
        messages: error messages of failed runs by name; a failed run does not need a row.
    """
    messages = messages or {}
    count, rows = len(rows), with_averages(rows)
    omitted = _omitted_datasets(rows, messages, console)
    console.print(narrowed(partial(_table, rows, messages, omitted), console))
    if omitted:
        console.print(
            f"not shown, as the terminal is too narrow: {escape(', '.join(sorted(omitted)))}", highlight=False
        )
    console.print(
        "validation losses in nats per token; AVG: mean over the datasets that are trained on; compute: tokens of the "
        "last stage relative to training from scratch on all data"
        + ("; RUN@average: the average of the run's weights" if len(rows) > count else "")
    )
    if different := incomparable_datasets(rows):
        console.print(
            f"not comparable, measured on different validation data or windows: {escape(', '.join(different))}"
        )
    for name, message in messages.items():
        console.print(f"[bold]{escape(name)}[/]: {escape(message)}", highlight=False)


def _omitted_datasets(rows: Sequence[ComparisonRow], messages: Mapping[str, str], console: Console) -> frozenset[str]:
    """The last datasets, whose columns would not fit in the console's width even without borders."""
    datasets = _datasets(rows)
    for count in range(len(datasets), 0, -1):
        omitted = frozenset(datasets[count:])
        table = narrowed(partial(_table, rows, messages, omitted), console)
        if table_width(table, console) <= console.width:
            return omitted
    return frozenset(datasets)


def _datasets(rows: Sequence[ComparisonRow]) -> list[str]:
    return sorted({name for row in rows for name in row.losses if "." not in name})


def _table(rows: Sequence[ComparisonRow], messages: Mapping[str, str], omitted: frozenset[str], _narrow: bool) -> Table:
    datasets = [name for name in _datasets(rows) if name not in omitted]
    table = Table(title="at the end of the last stage", title_justify="left", header_style="bold")
    table.add_column("run", overflow="fold")
    for column in (*datasets, "AVG", "forgetting", "compute", "state"):
        table.add_column(column, justify="left" if column == "state" else "right")
    for row in rows:
        losses = [_number(row.losses.get(name), ".4f") for name in datasets]
        state = "failed" if split_average(row.name)[0] in messages else "done" if row.is_done else f"in {row.stage}"
        means = [_number(row.average, ".4f"), _number(row.mean_forgetting, "+.4f")]
        table.add_row(escape(row.name), *losses, *means, f"{row.update_share:.2f}x", state)
    for name in messages:
        if name not in {row.name for row in rows}:
            table.add_row(escape(name), *[""] * (len(datasets) + 3), "failed")
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
