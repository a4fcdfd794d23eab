"""Table of the scores of several checkpoints, for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from titan_cpt.common.weights.named_weights import suffix_of
from titan_cpt.evaluation.scores import Score, ScoreChange, average_score, score_change


def print_scores(found: Mapping[str, Sequence[Score]], console: Console) -> None:
    """Print a row per task and a column per checkpoint, and the change from the first checkpoint to the last.

    Args:
        found: scores by checkpoint path; the same tasks in the same order for each.
        console: where to print.
    """
    titles = [_title(name, scores) for name, scores in found.items()]
    columns = list(found.values())
    if not columns[0]:
        return
    table = Table(title_justify="left", header_style="bold")
    for name in ("task", "shots", "metric"):
        table.add_column(name)
    for name in ("samples", *titles):
        table.add_column(name, justify="right", overflow="fold")
    if len(columns) > 1:
        for name in ("last - first", "p"):
            table.add_column(name, justify="right")
    for row in zip(*columns, strict=True):
        cells = [row[0].task, str(row[0].shots), row[0].metric, f"{row[0].samples:,}"]
        cells += [format_score(score.value, score.stderr) for score in row]
        if len(columns) > 1:
            change = score_change(row[0], row[-1])
            cells += [format_score(change.value, change.stderr, signed=True), format_p(change)]
        table.add_row(*cells)
    if len(columns[0]) > 1:
        means = [average_score(scores) for scores in columns]
        cells = ["average", "", "", "", *(format_score(*mean) for mean in means)]
        table.add_row(*cells, *([f"{means[-1][0] - means[0][0]:+.4f}", ""] if len(columns) > 1 else []), style="bold")
    console.print(table)
    console.print("± is the standard error; p: two-sided p-value of the change (* not paired: the samples differ)")


def _title(name: str, scores: Sequence[Score]) -> str:
    """Stage and step for a run's checkpoint; the path for another one."""
    if scores and scores[0].stage:
        return f"{scores[0].stage}{suffix_of(scores[0].average)} {scores[0].steps_done:,}"
    return name


def format_score(value: float, stderr: float | None, *, signed: bool = False) -> str:
    """A value, with its standard error if there is one."""
    return f"{value:{'+' if signed else ''}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def format_p(change: ScoreChange) -> str:
    """The p-value, with a star if the samples are not paired."""
    if change.p is None:
        return ""
    return ("< 0.0001" if change.p < 1e-4 else f"{change.p:.4f}") + ("" if change.paired else " *")


def scores_as_json(found: Mapping[str, Sequence[Score]]) -> dict[str, Any]:
    """The table as JSON: each checkpoint's scores with errors and sample counts, and the changes from first to last."""
    table: dict[str, Any] = {"checkpoints": {}, "changes": {}}
    columns = list(found.values())
    for title, scores in found.items():
        mean, error = average_score(scores) if scores else (None, None)
        table["checkpoints"][title] = {
            "average": {"value": mean, "stderr": error},
            "tasks": {
                score.task: {
                    "shots": score.shots,
                    "metric": score.metric,
                    "value": score.value,
                    "stderr": score.stderr,
                    "samples": score.samples,
                    "metrics": {name: {"value": pair[0], "stderr": pair[1]} for name, pair in score.metrics.items()},
                }
                for score in scores
            },
        }
    for first, last in zip(columns[0], columns[-1], strict=True):
        change = score_change(first, last)
        table["changes"][first.task] = {
            "value": change.value,
            "stderr": change.stderr,
            "p": change.p,
            "paired": change.paired,
        }
    return table
