"""Sections of the HTML report with losses: final losses, before and after each stage, forgetting and adaptation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from titan_cpt.reporting.benchmark_table import benchmark_table, example_generations
from titan_cpt.reporting.comparison import (
    ComparisonRow,
    incomparable_datasets,
    means_over_different_datasets,
    with_averages,
)
from titan_cpt.reporting.curves import curve_groups
from titan_cpt.reporting.html_parts import HtmlTable, Section
from titan_cpt.reporting.number_texts import number_text, token_text
from titan_cpt.reporting.run_log import RunLog
from titan_cpt.reporting.summary import summarize_log

_LAST_STEP = " After: at the last step, without the mean over the final window that final losses have."
_OPEN_TABLES = 4  # up to this number of runs, each has its own table; of more runs, one table is collapsed


def final_losses_section(rows: Sequence[ComparisonRow]) -> Section:
    """Each run's final losses, forgetting, adaptation and cost; an average of its weights has a row of its own."""
    count, rows = len(rows), with_averages(rows)
    datasets = sorted({name for row in rows for name in row.losses})
    head = ["run", *datasets, "AVG", "forgetting", "adaptation", "tokens", "compute"]
    values = []
    for row in rows:
        adaptation = row.adaptation if row.forgetting else None  # a run from scratch has only new data
        values.append([*(row.losses.get(name) for name in datasets), row.average, row.mean_forgetting, adaptation])
    body = []
    for row, line in zip(rows, values, strict=True):
        losses = [number_text(value, sign=column == len(datasets) + 1) for column, value in enumerate(line)]
        compute = f"{row.update_share:.2f}x" + ("" if row.is_done else f", still in {row.stage}")
        body.append([row.name, *losses, token_text(row.tokens), compute])
    different = incomparable_datasets(rows)
    mixed = means_over_different_datasets(rows)
    not_ranked = {*mixed, *different, *(["AVG"] if different else [])}
    best = set()
    for column, name in enumerate(head[1:-2]):
        known = [(value, index) for index, line in enumerate(values) if (value := line[column]) is not None]
        if len(known) > 1 and name not in not_ranked:
            best.add((min(known)[1], column + 1))
    return Section(
        "Final losses",
        "Validation loss in nats per token at the end of the last stage; the mean over its final window if it has one. "
        "AVG is the mean over the datasets trained on. Compute is the tokens of the last stage relative to training "
        "from scratch on all data. The lowest number of each column is bold."
        + (" RUN@average: the average of the run's weights at that step." if len(rows) > count else "")
        + (f" Not ranked, as the runs have different datasets: {', '.join(mixed)}." if mixed else "")
        + (f" Not comparable, as validation data or windows differ: {', '.join(different)}." if different else ""),
        tables=[HtmlTable(head, body, frozenset(best))],
    )


def stages_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Losses before and after each stage, as in the terminal."""
    tables = []
    rows_of: dict[str, list[list[str]]] = {run.name: _stage_rows(run) for run in runs}
    head = ["stage", "dataset", "loss before", "left at", "after", "forgetting", "bits per byte"]
    if len(runs) <= _OPEN_TABLES:
        for name, rows in rows_of.items():
            tables.append(HtmlTable(head, rows, summary=name if len(runs) > 1 else ""))
    else:
        together = [[name, *row] for name, rows in rows_of.items() for row in rows]
        tables.append(HtmlTable(["run", *head], together, summary="all runs", is_open=False))
    tables = [table.without_empty_columns() for table in tables if table.rows]
    if tables:
        yield Section(
            "Before and after each stage",
            "Validation losses in nats per token. Left at: the loss when training on that dataset last ended. "
            "Forgetting = after - left at; datasets that are new in a stage have none. A number with * was measured on "
            "other validation data or windows than the loss after it."
            + _LAST_STEP
            * any(stage["final_loss"] for run in runs for stage in summarize_log(run)["stages"]),
            tables=tables,
        )


def _stage_rows(run: RunLog) -> list[list[str]]:
    return [
        [stage["name"], name, *_stage_cells(stage, name)]
        for stage in summarize_log(run)["stages"]
        for name in sorted({*stage["before"], *stage["after"]})
    ]


def _stage_cells(stage: Mapping[str, Any], name: str) -> list[str]:
    before = number_text(stage["before"].get(name))
    bits = stage["bits_per_byte"].get(name)
    return [
        before + " *" if name in stage["not_comparable"] else before,
        number_text(stage["left_at"].get(name)),
        number_text(stage["after"].get(name)),
        number_text(stage["forgetting"].get(name), sign=True),
        "" if bits is None else f"{bits:.3f}",
    ]


def trade_off_section(rows: Sequence[ComparisonRow], runs: Sequence[RunLog]) -> Iterator[Section]:
    """Forgetting over adaptation, if at least two runs have both."""
    points = _trade_off_points(rows, runs)
    if len(points) > 1:
        from titan_cpt.reporting.figures import render_figure
        from titan_cpt.reporting.plots import plot_trade_off, trade_off_legend

        groups = curve_groups(runs)
        of_run = {id(run): number for number, group in enumerate(groups) for run in group.runs}
        colored = [
            (number := of_run[id(runs[index])], replace(row, name=groups[number].name), value)
            for index, row, value in points
        ]
        caption = (
            "One point per run; lower left is better. A hollow point is a run trained from scratch: its old data is "
            "compared with the mean loss at which the other runs left it."
        )
        plot = partial(plot_trade_off, colored)
        figure = render_figure("trade-off", caption, plot, trade_off_legend(colored))
        yield Section("Trade-off between forgetting and adaptation", figures=[figure])


def _trade_off_points(rows: Sequence[ComparisonRow], runs: Sequence[RunLog]) -> list[tuple[int, ComparisonRow, float]]:
    """(index of the run, its row, forgetting in nats per token) of each run for which both numbers are known.

    For a run from scratch, forgetting is its mean loss on old data minus the mean loss at which the other runs left
    that data, and adaptation its mean loss on the data that is new in the other runs' last stage.
    """
    left_at: dict[tuple[str, str | None], list[float]] = {}  # by dataset and identity of its validation data
    for run in runs:
        for stage in summarize_log(run)["stages"]:
            for name, value in stage["left_at"].items():
                if "@" in name:  # the same dataset on other windows, or the loss of an average
                    continue
                left_at.setdefault((name, stage["validation_ids"][name]), []).append(value)
    old = {name for name, _ in left_at}
    new = {name for run in runs for name in run.plan["stages"][-1]["new_datasets"] if name not in old}
    points = []
    for index, row in enumerate(rows):
        increases = [
            row.losses[name] - sum(losses) / len(losses)
            for (name, identity), losses in left_at.items()
            if name in row.losses and row.validation_ids.get(name) == identity
        ]
        forgetting = row.mean_forgetting if row.forgetting else sum(increases) / len(increases) if increases else None
        on_new = [row.losses[name] for name in new if name in row.losses]
        if forgetting is not None and row.adaptation is not None and on_new:
            point = row if row.forgetting else replace(row, adaptation=sum(on_new) / len(on_new))
            points.append((index, point, forgetting))
    return points


def benchmark_sections(runs: Sequence[RunLog]) -> Iterator[Section]:
    """For each run that has any: benchmark scores after each stage, and what it generated from the example prompts."""
    for run in runs:
        title = "Benchmarks" if len(runs) == 1 else f"Benchmarks of {run.name}"
        unread: list[str] = []
        table = benchmark_table(run, unread.append)
        texts = example_generations(run, unread.append)
        if table is not None or texts or unread:
            yield Section(
                title,
                "Scores with standard errors. Changes are paired by sample if both checkpoints were evaluated on the "
                "same samples; p is the probability of a change at least as large by chance. Below: text generated "
                "from the example prompts after each stage." + "".join(f" Not shown: {problem}." for problem in unread),
                tables=[] if table is None else [HtmlTable(table.head, table.rows)],
                details=texts,
            )
