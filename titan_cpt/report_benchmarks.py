"""What a run's folder holds of benchmarks: scores after each stage, what each stage changed, and continued prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from titan_cpt.errors import DataError
from titan_cpt.reading import read_text
from titan_cpt.scores import FOLDER, GENERATIONS, Score, difference, read_scores


@dataclass(frozen=True)
class BenchmarkTable:
    """Scores of one run: a row for each task, the stages in the order of training."""

    head: list[str]
    rows: list[list[str]]


def benchmark_table(run: Path) -> BenchmarkTable | None:
    """Every task's score after each stage, with its standard error, and what each further stage changed.

    Of a stage that was evaluated several times the last evaluation counts. A change stands with the standard error and
    the p of `difference`, sample by sample where the same samples were asked. None without any score.

    Raises:
        DataError: a score cannot be read.
    """
    found: dict[tuple[str, int, int | None], dict[str, Score]] = {}
    stages: list[str] = []
    for score in read_scores(run):  # in the order of training, so that the last of a stage stays
        found.setdefault((score.task, score.shots, score.limit), {})[score.stage] = score
        if score.stage not in stages:
            stages.append(score.stage)
    if not found:
        return None
    pairs = list(pairwise(stages))
    head = ["task", "shots", "metric", "samples", *(f"after {stage}" for stage in stages)]
    head += [f"change from {earlier} to {later}" for earlier, later in pairs]
    rows = []
    for (task, shots, limit), by_stage in sorted(
        found.items(), key=lambda item: (item[0][0], item[0][1], item[0][2] or 0)
    ):
        some = next(iter(by_stage.values()))
        row = [task, str(shots), some.metric, f"{some.samples:,}{'' if limit is None else ' (of more)'}"]
        row += [_value(by_stage.get(stage)) for stage in stages]
        row += [_change(by_stage, earlier, later, some.metric) for earlier, later in pairs]
        rows.append(row)
    return BenchmarkTable(head, rows)


def continuations(run: Path) -> list[tuple[str, str]]:
    """Each example prompt, and the text that the run made of it after each stage.

    Raises:
        DataError: a file cannot be read.
    """
    kept: dict[int, tuple[int, str, list[Mapping[str, str]]]] = {}
    for path in sorted((run / FOLDER).glob(f"**/{GENERATIONS}")):
        try:
            found = json.loads(read_text(path))
            place = int(found["steps_done"]), str(found["stage"]), list(found["texts"])
            index = int(found["stage_index"])
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: cannot be read: {error}. Remove it and continue the examples again") from None
        kept[index] = max(kept.get(index, (-1, "", [])), place, key=lambda one: one[0])
    by_prompt: dict[str, list[str]] = {}
    for _, (steps, stage, texts) in sorted(kept.items()):
        for text in texts:
            told = f"after {stage} ({steps:,} steps): {text['prompt']}{text['continuation']}"
            by_prompt.setdefault(text["prompt"], []).append(told)
    return [(prompt, "\n\n".join(texts)) for prompt, texts in by_prompt.items()]


def _value(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _change(by_stage: Mapping[str, Score], earlier: str, later: str, metric: str) -> str:
    if earlier not in by_stage or later not in by_stage or metric not in by_stage[later].metrics:
        return ""
    change = difference(by_stage[earlier], by_stage[later], metric)
    if change.stderr is None or change.p is None:
        return f"{change.value:+.4f}"
    p = "< 0.0001" if change.p < 1e-4 else f"= {change.p:.4f}"
    return f"{change.value:+.4f} ± {change.stderr:.4f} (p {p}{'' if change.paired else ', other samples'})"
