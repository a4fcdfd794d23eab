"""Scores of several checkpoints beside each other, on a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from titan_cpt.evaluation.scores import Score, ScoreChange, average_score, score_change


def print_scores(found: Mapping[str, Sequence[Score]], console: Console) -> None:
    """A row for each task, a column for each checkpoint, and what changed from the first one to the last.

    Args:
        found: the scores by the checkpoint's name, the same tasks in the same order.
    """
    titles, columns = [_title(name, scores) for name, scores in found.items()], list(found.values())
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
        cells += [in_words(score.value, score.stderr) for score in row]
        if len(columns) > 1:
            change = score_change(row[0], row[-1])
            cells += [in_words(change.value, change.stderr, signed=True), probability(change)]
        table.add_row(*cells)
    if len(columns[0]) > 1:
        means = [average_score(scores) for scores in columns]
        cells = ["average", "", "", "", *(in_words(*mean) for mean in means)]
        table.add_row(*cells, *([f"{means[-1][0] - means[0][0]:+.4f}", ""] if len(columns) > 1 else []), style="bold")
    console.print(table)
    console.print("± is the standard error; p: how likely such a change is by chance (two-sided; * samples differ)")


def _title(name: str, scores: Sequence[Score]) -> str:
    """A run's checkpoint by stage and step, another one by its folder."""
    if scores and scores[0].stage:
        return f"{scores[0].stage} {scores[0].steps_done:,}"
    return name


def in_words(value: float, stderr: float | None, *, signed: bool = False) -> str:
    """A value with its standard error, if it has one."""
    return f"{value:{'+' if signed else ''}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def probability(change: ScoreChange) -> str:
    """p with a star where the samples are not the same ones."""
    if change.p is None:
        return ""
    return ("< 0.0001" if change.p < 1e-4 else f"{change.p:.4f}") + ("" if change.paired else " *")


def scores_as_json(found: Mapping[str, Sequence[Score]]) -> dict[str, Any]:
    """The table's content: each checkpoint's tasks with value, error, samples; what changed from first to last."""
    answer: dict[str, Any] = {"checkpoints": {}, "changes": {}}
    columns = list(found.values())
    for title, scores in found.items():
        mean, error = average_score(scores) if scores else (None, None)
        answer["checkpoints"][title] = {
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
        answer["changes"][first.task] = {
            "value": change.value,
            "stderr": change.stderr,
            "p": change.p,
            "paired": change.paired,
        }
    return answer
