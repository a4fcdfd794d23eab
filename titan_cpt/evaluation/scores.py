"""What a model scored, as it is kept on disk, and whether two scores differ by more than chance.

A file for each task, below `evaluations/` in the run's folder, written as soon as the task is done; with the result on
every single sample, so that two models are compared sample by sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.common.reading import read_text
from titan_cpt.common.run_folder import EVALUATIONS_FOLDER
from titan_cpt.errors import DataError, TitanError

FORMAT = 1
_LARGEST = 1e100  # squares and sums of scores stay finite


@dataclass(frozen=True)
class Score:
    """One task's result on one checkpoint.

    Attributes:
        identity: what decides the answers: the checkpoint's files, precision, longest input, versions. A score whose
            identity is another one's is not taken for it.
        shots: worked examples before each question.
        limit: only so many samples of each part of the task were asked, evenly spread; None for all.
        metric: the one that counts, a key of `metrics`.
        metrics: name to (value, standard error), the error None where the harness has none.
        documents: a digest of the samples and of how they were asked, in order: equal digests make a pair.
        per_sample: metric to each sample's value, in order; only metrics that are a mean of these.
        stage: of the run, "" for a checkpoint outside of runs; `steps_done` in it, `run_step` in all.
        seconds: that it took.
    """

    task: str
    shots: int
    metric: str
    metrics: Mapping[str, tuple[float, float | None]]
    samples: int
    limit: int | None
    documents: str
    per_sample: Mapping[str, Sequence[float]]
    identity: Mapping[str, Any]
    checkpoint: str
    stage: str
    stage_index: int
    steps_done: int
    run_step: int
    seconds: float

    @property
    def value(self) -> float:
        """Of the metric that counts."""
        return self.metrics[self.metric][0]

    @property
    def stderr(self) -> float | None:
        """Its standard error."""
        return self.metrics[self.metric][1]


@dataclass(frozen=True)
class ScoreChange:
    """A later score minus an earlier one.

    Attributes:
        stderr: of the difference: of the samples' own differences where both were asked the same, else from both
            scores' errors.
        p: probability of a difference at least this large if there were none (two-sided, normal).
        paired: the samples are the same.
    """

    value: float
    stderr: float | None
    p: float | None
    paired: bool


def score_change(before: Score, after: Score, metric: str | None = None) -> ScoreChange:
    """What changed in a metric, `after`'s own if none is named, and whether it may be chance.

        d_i = after_i - before_i        stderr = sqrt(sum (d_i - mean d)^2 / (n (n - 1)))        z = mean d / stderr

    Samples count as independent of each other; those made from one template are less so, and p is then too small.
    """
    metric = metric or after.metric
    value = after.metrics[metric][0] - before.metrics[metric][0]
    one, other = before.per_sample.get(metric), after.per_sample.get(metric)
    paired = before.documents == after.documents and one is not None and other is not None and len(one) == len(other)
    if paired and one is not None and other is not None and len(one) > 1 and all(map(math.isfinite, (*one, *other))):
        changes = [late - early for early, late in zip(one, other, strict=True)]
        mean = math.fsum(changes) / len(changes)
        squares = math.fsum((change - mean) ** 2 for change in changes)
        stderr: float | None = math.sqrt(squares / (len(changes) * (len(changes) - 1)))
    else:
        errors = (before.metrics[metric][1], after.metrics[metric][1])
        stderr = None if None in errors else math.hypot(*(error for error in errors if error is not None))
    return ScoreChange(value, stderr, None if stderr is None else _two_sided(value, stderr), paired)


def _two_sided(value: float, stderr: float) -> float:
    if stderr == 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value / stderr) / math.sqrt(2))


def average_score(scores: Sequence[Score]) -> tuple[float, float | None]:
    """The plain mean of several tasks' metrics and its standard error, the tasks independent of each other."""
    values = [score.value for score in scores]
    value = (math.fsum if all(map(math.isfinite, values)) else sum)(values) / len(scores)
    errors = [score.stderr for score in scores]
    if None in errors:
        return value, None
    return value, math.hypot(*(error for error in errors if error is not None)) / len(scores)


def file_name(task: str, shots: int | None, limit: int | None) -> str:
    """Where a task's score lies in the folder of its checkpoint's scores."""
    name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in task)
    return f"{name}-{'own' if shots is None else shots}shot{'' if limit is None else f'-limit{limit}'}.json"


def read_score(path: Path) -> Score:
    """A score as it was kept.

    Raises:
        DataError: the file is missing or damaged, or of another version.
        AccessError: the system does not let it be read.
    """
    try:
        found = json.loads(read_text(path))
        version = found.pop("format")
        metrics = {name: (_number(pair[0]), _number(pair[1], null=True)) for name, pair in found["metrics"].items()}
        score = Score(**{**found, "metrics": metrics})
        _check(score)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}. Remove it and evaluate again") from None
    if version != FORMAT:
        raise DataError(f"{path}: is of format {version!r}, this version reads {FORMAT}. Remove it and evaluate again")
    return score


def read_scores(run: Path, complain: Callable[[str], None] | None = None) -> list[Score]:
    """Every score that a run's folder holds, in the order of training, then of tasks.

    Args:
        complain: called with a sentence for each file that cannot be read, which is then left out.

    Raises:
        DataError, AccessError: a file is damaged or cannot be read, and nobody is told of it.
    """
    found = []
    for path in sorted((run / EVALUATIONS_FOLDER).glob("**/*shot*.json")):
        try:
            found.append(read_score(path))
        except TitanError as error:
            if complain is None:
                raise
            complain(str(error))
    return sorted(found, key=lambda score: (score.stage_index, score.steps_done, score.task, score.shots))


def _check(score: Score) -> None:
    """Raise ValueError if a field of a score that was read from a file is of another kind than `Score` says."""
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("task", "metric", "documents", "checkpoint", "stage"), str),
        **dict.fromkeys(("shots", "samples", "stage_index", "steps_done", "run_step"), int),
        **dict.fromkeys(("per_sample", "identity"), dict),
        "limit": (int, type(None)),
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(getattr(score, name), kind)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: of another kind than a score's")
    if score.metric not in score.metrics:
        raise ValueError(f"metrics: without {score.metric!r}, the one that counts")
    _number(score.seconds)
    for values in score.per_sample.values():
        if not isinstance(values, list):
            raise ValueError("per_sample: not lists of numbers")
        for value in values:
            _number(value)


def _number(value: Any, *, null: bool = False) -> Any:
    """The value itself, if it is a number of a size that can be squared and summed, or null where that is allowed."""
    if value is None and null:
        return None
    if not isinstance(value, int | float) or (abs(value) > _LARGEST and value not in (math.inf, -math.inf)):
        raise ValueError(f"{value!r:.40} is not a number of a score")
    return value
