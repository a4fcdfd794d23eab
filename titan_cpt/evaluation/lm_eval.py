"""Run a benchmark task of lm-evaluation-harness on a model, and collect its metrics sample by sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from lm_eval.evaluator import evaluate

from titan_cpt.common.numbers import evenly_spaced
from titan_cpt.config.suites import Task
from titan_cpt.evaluation.lm_eval_model import CheckpointLM
from titan_cpt.evaluation.lm_eval_tasks import without_harness_output

_BOOTSTRAPS = 1000  # resamplings for the standard error of metrics that are not means


@dataclass(frozen=True)
class TaskResult:
    """The result of a task.

    Attributes:
        shots: number of few-shot examples.
        metrics: name -> (value, standard error); a metric of a second filter is called METRIC@FILTER.
        samples: number of samples.
        documents: digest of the samples and their prompts, in order.
        per_sample: metric name -> the samples' values, for metrics that are their mean.
    """

    shots: int
    metrics: dict[str, tuple[float, float | None]]
    samples: int
    documents: str
    per_sample: dict[str, list[float]]


def run_task(model: CheckpointLM, harness_task: Any, task: Task, limit: int | None) -> TaskResult:
    """Run a loaded task on a model.

    Args:
        limit: number of samples, of each subtask if there are several; None for all. They are evenly spaced, since the
            first ones are often of one kind.
    """
    chosen = None
    if limit is not None:
        subtasks = harness_task["tasks"].items()
        chosen = {name: _SampleIndices(evenly_spaced(len(part.eval_docs), limit)) for name, part in subtasks}
    with without_harness_output():
        found: Any = evaluate(model, harness_task, samples=chosen, bootstrap_iters=_BOOTSTRAPS, log_samples=True)
    metrics, per_sample = _metrics(found, task.name)
    parts = sorted(found["samples"])
    filters = {name: samples[0]["filter"] for name, samples in found["samples"].items()}
    digest = sha256()
    first = [sample for part in parts for sample in found["samples"][part] if sample["filter"] == filters[part]]
    for sample in first:
        digest.update("".join(str(sample[key]) for key in ("doc_hash", "prompt_hash", "target_hash")).encode())
    shots = {int(found["n-shot"][part]) for part in parts}
    return TaskResult(max(shots), metrics, len(first), digest.hexdigest(), per_sample)


def _metrics(
    found: Mapping[str, Any], task: str
) -> tuple[dict[str, tuple[float, float | None]], dict[str, list[float]]]:
    """`metrics` and `per_sample` of a TaskResult, from the harness's results."""
    metrics: dict[str, tuple[float, float | None]] = {}
    per_sample: dict[str, list[float]] = {}
    results = found["results"][task]
    samples = [sample for part in sorted(found["samples"]) for sample in found["samples"][part]]
    for key, value in results.items():
        metric, comma, applied = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if metric not in metrics else f"{metric}@{applied}"
        error = results.get(f"{metric}_stderr,{applied}")
        metrics[name] = (float(value), float(error) if isinstance(error, int | float) else None)
        values = [sample.get(metric) for sample in samples if sample["filter"] == applied]
        numbers = [float(one) for one in values if isinstance(one, int | float)]
        is_complete = numbers and len(numbers) == len(values)
        if is_complete and math.isclose(math.fsum(numbers) / len(numbers), value, abs_tol=1e-9):
            per_sample[name] = numbers
    return metrics, per_sample


class _SampleIndices(list[int]):
    """Sorted indices with a fast `in`: the harness tests every sample of a task for membership."""

    def __init__(self, indices: Iterable[int]) -> None:
        super().__init__(indices)
        self._known = frozenset(self)

    def __contains__(self, index: object) -> bool:
        """Membership in constant time."""
        return index in self._known
