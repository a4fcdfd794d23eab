"""Run benchmarks on checkpoints. Each task's score is written as soon as it is known, and is reused by the next call.

A checkpoint is read from its folder into a separate model, under any parallelism degrees, so that a run can evaluate a
checkpoint while it trains: the live model is not used, and the state of the random number generators is restored.
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.averages import require_weights
from titan_cpt.checkpoint.provenance import documents_begin_with_bos, precision_of_run
from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.run_folder import TENSORBOARD_FOLDER
from titan_cpt.common.weights.named_weights import AVERAGE, NamedWeights, suffix_of
from titan_cpt.config.suites import Task
from titan_cpt.distributed.process_group import ProcessInfo, barrier
from titan_cpt.errors import AccessError, ConfigError, DataError, TitanError, how_to_install
from titan_cpt.evaluation.agreement import load_on_all_ranks, on_all_ranks
from titan_cpt.evaluation.checkpoint_paths import run_of, scores_folder, stage_ends
from titan_cpt.evaluation.inference import LoadedModel, open_checkpoint
from titan_cpt.evaluation.prompts import has_example_generations, save_example_generations
from titan_cpt.evaluation.score_table import format_score
from titan_cpt.evaluation.scores import Score, average_score, file_name, read_score, write_score

if TYPE_CHECKING:
    from titan_cpt.evaluation.lm_eval import TaskResult
    from titan_cpt.evaluation.lm_eval_model import CheckpointLM
    from titan_cpt.evaluation.lm_eval_tasks import TaskCatalog


@dataclass(frozen=True)
class EvalRequest:
    """Which tasks to run on each checkpoint, and how to load it; see `open_checkpoint` for the other attributes.

    Attributes:
        suite: name for the average over the tasks; None for single tasks, which have no average.
        folder: folder of further tasks (YAML files), beside those of lm-evaluation-harness.
        limit: number of samples per task, evenly spaced; None for all.
        again: also run tasks that already have a score.
    """

    tasks: tuple[Task, ...]
    suite: str | None = None
    folder: Path | None = None
    limit: int | None = None
    precision: str | None = None
    tokenizer: str | None = None
    max_length: int | None = None
    sharded: bool = False
    batch_tokens: int = 8192
    again: bool = False


@cache
def open_tasks(tasks: tuple[Task, ...], folder: Path | None) -> TaskCatalog:
    """lm-evaluation-harness with these tasks; takes seconds, and is cached for the process.

    Raises:
        ConfigError: it is not installed, or lacks a task.
        DataError: the folder of further tasks holds no task.
    """
    try:
        from titan_cpt.evaluation.lm_eval_tasks import TaskCatalog, not_fetched_message
    except ImportError as error:
        raise ConfigError(f"benchmarks need lm-evaluation-harness ({error}); {how_to_install('lm_eval')}") from None
    catalog = TaskCatalog(folder, tasks)
    if all(catalog.is_not_fetched(task) for task in tasks):
        raise ConfigError(not_fetched_message([task.name for task in tasks], folder))
    for task in tasks:
        if not catalog.is_not_fetched(task):  # if only some are missing, `load` reports those and the others are run
            catalog.require(task)
    return catalog


def evaluate(
    checkpoint: NamedWeights,
    process: ProcessInfo,
    request: EvalRequest,
    *,
    log: Callable[[str], None],
    examples: bool = False,
    verify_checksums: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[list[Score], list[str]]:
    """Scores of one checkpoint: stored ones, and new ones for tasks without a score; collective.

    Args:
        checkpoint: the weights that are evaluated.
        log: called on rank 0 with a line for each task.
        examples: also generate continuations of the example prompts.
        verify_checksums: compare the checkpoint's files with their checksums first.
        should_stop: called before each task, returns the same on every rank; if True, the remaining tasks are skipped.

    Returns:
        The scores, and the names of tasks without one: their dataset could not be loaded, or they failed.

    Raises:
        CheckpointError: the folder is not a complete checkpoint, or lacks the average.
    """
    log = log if process.rank == 0 else _ignore
    target = _CheckpointEval(checkpoint, process, request, verify_checksums)
    scores: list[Score] = []
    missing: list[str] = []
    new_scores: list[Score] = []
    with fixed_random_state():
        for task in request.tasks:
            path = target.folder / file_name(task.name, task.shots, request.limit)
            try:
                score = _stored_score(path, target, task)
                if score is not None:
                    log(f"{_line(score)}, stored score")
                elif should_stop():
                    break
                else:
                    score = _run_task(target, task, path)
                    new_scores.append(score)
                    log(f"{_line(score)}, {score.samples:,} samples, {score.seconds:.1f} s")
                scores.append(score)
            except DataError as error:
                log(f"  {error}")
                missing.append(task.name)
        if examples and not should_stop() and not on_all_ranks(target.has_generations(), process):
            save_example_generations(target.load())
        target.close()
    if process.rank == 0 and new_scores:
        _write_summary(target, scores, new_scores)
    barrier()
    return scores, missing


def evaluate_all(
    paths: Sequence[Path], process: ProcessInfo, request: EvalRequest, *, log: Callable[[str], None]
) -> tuple[dict[str, list[Score]], list[str]]:
    """Scores of several checkpoints, keyed by path, and the tasks that some checkpoint has no score of; collective.

    Only tasks with a score on every checkpoint are in the result.

    Args:
        paths: checkpoints, or runs, which stand for the checkpoints at the ends of their stages; with @average for
            their averages.

    Raises:
        CheckpointError: a folder is neither.
        ConfigError: lm-evaluation-harness is not installed, or lacks a task.
    """
    checkpoints = [checkpoint for path in paths for checkpoint in stage_ends(path)]
    open_tasks(request.tasks, request.folder)
    found: dict[str, list[Score]] = {}
    lacking: set[str] = set()
    for checkpoint in checkpoints:
        if process.rank == 0:
            log(f"{checkpoint}")
        scores, missing = evaluate(checkpoint, process, request, log=log)
        found[str(checkpoint)] = scores
        lacking.update(missing)
    columns = {name: [score for score in scores if score.task not in lacking] for name, scores in found.items()}
    return columns, sorted(lacking)


class _CheckpointEval:
    """One checkpoint to evaluate. Its weights are loaded when the first task needs them."""

    def __init__(
        self, weights: NamedWeights, process: ProcessInfo, request: EvalRequest, verify_checksums: bool
    ) -> None:
        self.weights = weights
        self.checkpoint = weights.folder
        self.process = process
        self.request = request
        self._verify_checksums = verify_checksums
        self.record = manifest.read(self.checkpoint)
        require_weights(weights, self.record)
        self.run = run_of(self.checkpoint)
        self.folder = scores_folder(weights, self.record)
        self._loaded: LoadedModel | None = None
        self._model: CheckpointLM | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the scores and is known without loading the weights; see `Score.identity`."""
        return {
            "files": manifest.digest_of_files(self.record),
            **({"weights": AVERAGE} if self.weights.average else {}),
            "precision": self.request.precision or precision_of_run(self.checkpoint),
            "tokenizer": self.request.tokenizer,
            **({"add_bos": True} if self._adds_bos() else {}),
            "max_length": self.request.max_length,
            "harness": version("lm_eval"),
        }

    def _adds_bos(self) -> bool:
        """Whether texts begin with the begin-of-document token. Older versions never added it for imported models."""
        return documents_begin_with_bos(self.record, self.checkpoint, self.request.tokenizer) is True

    def has_generations(self) -> bool:
        """Whether continuations of the example prompts are stored for these weights."""
        return has_example_generations(self.weights, self.record)

    def load(self) -> LoadedModel:
        """The loaded checkpoint; loads it on the first call."""
        if self._loaded is None:
            request = self.request
            self._loaded = open_checkpoint(
                self.weights,
                self.process,
                precision=request.precision,
                tokenizer=request.tokenizer,
                max_length=request.max_length,
                sharded=request.sharded,
                batch_tokens=request.batch_tokens,
                verify_checksums=self._verify_checksums,
            )
        return self._loaded

    def run_harness_task(self, harness_task: Any, task: Task) -> TaskResult:
        """Run a loaded task on the checkpoint."""
        from titan_cpt.evaluation.lm_eval import run_task
        from titan_cpt.evaluation.lm_eval_model import CheckpointLM

        if self._model is None:
            self._model = CheckpointLM(self.load())
        try:
            return run_task(self._model, harness_task, task, self.request.limit)
        except (TitanError, KeyboardInterrupt):
            raise
        except Exception as error:  # of the task's own code, or of the device; other tasks may still run
            raise DataError(f"task {task.name}: failed: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Free the memory; a training run has Python's garbage collector switched off."""
        self._loaded = self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run_task(target: _CheckpointEval, task: Task, path: Path) -> Score:
    """Load a task's dataset, run the task, and write its score on rank 0; collective."""
    catalog = open_tasks(target.request.tasks, target.request.folder)
    harness_task = load_on_all_ranks(lambda: catalog.load(task), target.process)
    began = time.perf_counter()
    result = target.run_harness_task(harness_task, task)
    metric = task.metric or next(iter(result.metrics))
    if metric not in result.metrics:
        raise DataError(f"task {task.name}: has no metric {metric!r}; it has {', '.join(result.metrics)}")
    record = target.record
    score = Score(
        task=task.name,
        metric=metric,
        **asdict(result),
        limit=target.request.limit,
        identity=target.identity,
        checkpoint=str(target.weights),
        stage=str(record["stage"]) if target.run is not None else "",
        stage_index=int(record["stage_index"]),
        steps_done=int(record["steps_done"]),
        run_step=int(record["run_step"]),
        seconds=time.perf_counter() - began,
        average=target.weights.average,
    )
    if target.process.rank == 0:
        write_score(path, score)
    return score


def _stored_score(path: Path, target: _CheckpointEval, task: Task) -> Score | None:
    """The score of an earlier evaluation of the same weights in the same way, if every rank has it; collective.

    Raises:
        DataError: the system refuses to read the file on some rank. It may be intact, so it is not overwritten.
    """
    if target.request.again:
        return None
    score, unreadable = _read_stored_score(path, target, task)
    if not on_all_ranks(not unreadable, target.process):
        raise DataError(unreadable or f"{path}: another rank cannot read it")
    return score if on_all_ranks(score is not None, target.process) else None


def _read_stored_score(path: Path, target: _CheckpointEval, task: Task) -> tuple[Score | None, str]:
    """This rank's stored score, if any, and why the file cannot be read."""
    try:
        score = read_score(path)
    except DataError:
        return None, ""  # there is none, or it is damaged: the task is run again
    except AccessError as error:
        return None, str(error)
    if score.identity != target.identity or (task.metric or score.metric) not in score.metrics:
        return None, ""
    return replace(score, metric=task.metric or score.metric), ""


def _write_summary(target: _CheckpointEval, scores: Sequence[Score], new: Sequence[Score]) -> None:
    """Write the suite's average, and the new scores to the run's TensorBoard if it has one."""
    suite = target.request.suite
    complete = suite is not None and len(scores) == len(target.request.tasks)
    mean, error = average_score(scores)
    if complete:
        limit = target.request.limit
        values = {
            score.task: {"metric": score.metric, "value": score.value, "stderr": score.stderr} for score in scores
        }
        summary = {"suite": suite, "limit": limit, "average": mean, "stderr": error, "tasks": values}
        name = f"{suite}{'' if limit is None else f'-limit{limit}'}.json"
        write_text_atomically(target.folder / name, json.dumps(summary, indent=1))
    if target.run is None or not (target.run / TENSORBOARD_FOLDER).is_dir():
        return
    from torch.utils.tensorboard import SummaryWriter  # takes half a second to import

    writer = SummaryWriter(str(target.run / TENSORBOARD_FOLDER))
    step = int(target.record["run_step"])
    suffix = suffix_of(target.weights.average)
    for score in new:
        writer.add_scalar(f"evaluation/{score.task}{suffix}/{score.metric}", score.value, step)
    if complete:
        writer.add_scalar(f"evaluation/{suite}{suffix}/average", mean, step)
    writer.close()


@contextmanager
def fixed_random_state() -> Iterator[None]:
    """Seed all random number generators for the block, and restore their state afterwards."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if device_states:
            torch.cuda.set_rng_state_all(device_states)


def _line(score: Score) -> str:
    return f"  {score.task}: {score.metric} {format_score(score.value, score.stderr)}"


def _ignore(_line: str) -> None:
    pass
