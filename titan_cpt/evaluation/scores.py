"""Benchmark scores on disk, and the significance of differences between them.

Each task has a file below `evaluations/` in the run's folder. It holds the result on every sample, so that two models
are compared sample by sample (paired).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.reading import read_text
from titan_cpt.common.run_folder import EVALUATIONS_FOLDER
from titan_cpt.errors import DataError, TitanError

FORMAT = 1
_LARGEST = 1e100  # so that squares and sums of scores are finite


@dataclass(frozen=True)
class Score:
    """One task's result on one checkpoint.

    Attributes:
        shots: number of few-shot examples.
        metric: the main metric, a key of `metrics`.
        metrics: name -> (value, standard error); the error is None if the harness does not give one.
        limit: number of samples of each subtask, evenly spaced; None for all.
        documents: digest of the samples and their prompts, in order. Scores with equal digests can be paired.
        per_sample: metric name -> each sample's value, in order; only metrics that are the mean of these.
        identity: everything that decides the result: the checkpoint's files, precision, longest input, versions. A
            stored score is reused only for an equal identity.
        checkpoint: path of the checkpoint.
        stage: the stage's name; "" for a checkpoint outside of runs.
        steps_done: steps of that stage.
        run_step: steps of the whole run.
        seconds: run time.
        average: of the average in the checkpoint, not of the weights that training continues with.
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
    average: bool = False

    @property
    def value(self) -> float:
        """Value of the main metric."""
        return self.metrics[self.metric][0]

    @property
    def stderr(self) -> float | None:
        """Standard error of the main metric."""
        return self.metrics[self.metric][1]


@dataclass(frozen=True)
class ScoreChange:
    """A later score minus an earlier one.

    Attributes:
        stderr: standard error: from the samples' differences if paired, else from the standard errors of both scores.
        p: two-sided p-value of a normal test.
        paired: both scores are on the same samples.
    """

    value: float
    stderr: float | None
    p: float | None
    paired: bool


def score_change(before: Score, after: Score, metric: str | None = None) -> ScoreChange:
    """Change of a metric and its significance; `metric` defaults to the main metric of `after`.

        d_i = after_i - before_i        stderr = sqrt(sum (d_i - mean d)^2 / (n (n - 1)))        z = mean d / stderr

    Samples are assumed to be independent; if many are made from one template, p is too small.
    """
    metric = metric or after.metric
    value = after.metrics[metric][0] - before.metrics[metric][0]
    one = before.per_sample.get(metric)
    other = after.per_sample.get(metric)
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
    """The unweighted mean of the tasks' main metrics, and its standard error if the tasks are independent."""
    values = [score.value for score in scores]
    value = (math.fsum if all(map(math.isfinite, values)) else sum)(values) / len(scores)
    errors = [score.stderr for score in scores]
    if None in errors:
        return value, None
    return value, math.hypot(*(error for error in errors if error is not None)) / len(scores)


def file_name(task: str, shots: int | None, limit: int | None) -> str:
    """File name of a task's score in the folder of its checkpoint's scores."""
    name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in task)
    return f"{name}-{'own' if shots is None else shots}shot{'' if limit is None else f'-limit{limit}'}.json"


def read_score(path: Path) -> Score:
    """Read a score.

    Raises:
        DataError: the file is missing or damaged, or has another format version.
        AccessError: the system refuses to read it.
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
        raise DataError(f"{path}: has format {version!r}, this version reads {FORMAT}. Remove it and evaluate again")
    return score


def write_score(path: Path, score: Score) -> None:
    """Write a score, atomically; creates its folder."""
    per_sample = {
        metric: [int(value) if value == int(value) else value for value in values]  # 0 and 1, not 0.0 and 1.0
        for metric, values in score.per_sample.items()
    }
    found = {"format": FORMAT, **asdict(score), "per_sample": per_sample}
    if not score.average:
        del found["average"]  # versions before averages do not know it
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(found))


def read_scores(run: Path, on_unreadable: Callable[[str], None] | None = None) -> list[Score]:
    """All scores in a run's folder, sorted by training step, then task.

    Args:
        on_unreadable: called with a message for each file that cannot be read, which is then skipped.

    Raises:
        DataError, AccessError: a file is damaged or cannot be read, and `on_unreadable` is None.
    """
    found = []
    for path in sorted((run / EVALUATIONS_FOLDER).glob("**/*shot*.json")):
        try:
            found.append(read_score(path))
        except TitanError as error:
            if on_unreadable is None:
                raise
            on_unreadable(str(error))
    return sorted(
        found, key=lambda score: (score.stage_index, score.steps_done, score.average, score.task, score.shots)
    )


def _check(score: Score) -> None:
    """Raise ValueError if a field of a score read from a file has the wrong type."""
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("task", "metric", "documents", "checkpoint", "stage"), str),
        **dict.fromkeys(("shots", "samples", "stage_index", "steps_done", "run_step"), int),
        **dict.fromkeys(("per_sample", "identity"), dict),
        "limit": (int, type(None)),
        "average": bool,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(getattr(score, name), kind)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: of the wrong type")
    if score.metric not in score.metrics:
        raise ValueError(f"metrics: {score.metric!r} is missing")
    _number(score.seconds)
    for values in score.per_sample.values():
        if not isinstance(values, list):
            raise ValueError("per_sample: not a list of numbers")
        for value in values:
            _number(value)


def _number(value: Any, *, null: bool = False) -> Any:
    """The value, if it is a number small enough to be squared and summed, or None where `null` allows it."""
    if value is None and null:
        return None
    if not isinstance(value, int | float) or (abs(value) > _LARGEST and value not in (math.inf, -math.inf)):
        raise ValueError(f"{value!r:.40} is not a valid number")
    return value
