"""Benchmarks on checkpoints: each task's score is kept as soon as it is there, and a task that is done is not repeated.

A checkpoint is met through its folder only, in whatever layout it was saved, also inside a run that is still training:
the weights are read into a model of their own, and the random numbers of the process are put back, so that the run goes
on as if nothing had happened.
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.provenance import find_base_model, find_tokenizer, precision_of_run
from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.run_folder import TENSORBOARD_FOLDER
from titan_cpt.config.suites import Task
from titan_cpt.distributed.process_group import ProcessInfo, barrier
from titan_cpt.errors import AccessError, ConfigError, DataError, TitanError, how_to_install
from titan_cpt.evaluation.checkpoint_paths import run_of, scores_folder, stage_ends
from titan_cpt.evaluation.inference import LoadedModel, open_checkpoint
from titan_cpt.evaluation.prompts import has_example_generations, save_example_generations
from titan_cpt.evaluation.scores import FORMAT, Score, average_score, file_name, read_score

if TYPE_CHECKING:
    from titan_cpt.evaluation.lm_eval import Answers, CheckpointLM, Tasks


@dataclass(frozen=True)
class EvalRequest:
    """What is asked of every checkpoint, and how it is opened; see `open_checkpoint`.

    Attributes:
        suite: the name under which the tasks' average is kept; None for tasks by themselves.
        folder: of tasks beside the harness's own.
        limit: only so many samples of each task, evenly spread.
        again: repeat what is done already.
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
def open_tasks(asked: tuple[Task, ...], folder: Path | None) -> Tasks:
    """The harness, once it is known that it has all these tasks; it takes seconds, once in a process.

    Raises:
        ConfigError: it is not installed, or has no such task.
        DataError: the folder of tasks holds none.
    """
    try:
        from titan_cpt.evaluation.lm_eval import Tasks, not_fetched
    except ImportError as error:
        raise ConfigError(f"benchmarks need lm-evaluation-harness ({error}); {how_to_install('lm_eval')}") from None
    tasks = Tasks(folder, asked)
    if all(tasks.is_not_fetched(task) for task in asked):
        raise ConfigError(not_fetched([task.name for task in asked], folder))
    for task in asked:
        if not tasks.is_not_fetched(task):  # one of several says so when it is loaded, and the others are asked
            tasks.require(task)
    return tasks


def evaluate(
    checkpoint: Path,
    ranks: ProcessInfo,
    asked: EvalRequest,
    *,
    log: Callable[[str], None],
    examples: bool = False,
    verify_checksums: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[list[Score], list[str]]:
    """Scores of one checkpoint, those that were kept and those that were still missing; collective.

    Args:
        tell: is given a line for each task; on rank 0 only.
        examples: continue the example prompts as well.
        checked: compare the checkpoint's checksums first.
        interrupted: asked before each task, with the same answer on every rank; the rest is left out once it says so.

    Returns:
        The scores, and the names of tasks that have none: their dataset could not be loaded, or they failed.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
    """
    say = log if ranks.rank == 0 else _nothing
    bench = _Bench(checkpoint, ranks, asked, verify_checksums)
    scores, missing, asked_now = list[Score](), list[str](), list[Score]()
    with _undisturbed():
        for task in asked.tasks:
            path = bench.folder / file_name(task.name, task.shots, asked.limit)
            kept, unreadable = (None, "") if asked.again else _kept(path, bench, task)
            if not _everywhere(not unreadable, ranks):  # it may be whole: not asked again and written over
                say(f"  {unreadable or f'{path}: another rank cannot read it'}")
                missing.append(task.name)
                continue
            if _everywhere(kept is not None, ranks) and kept is not None:
                say(f"  {task.name}: {_said(kept)}, kept from before")
                scores.append(kept)
                continue
            if should_stop():
                break
            try:
                tasks = open_tasks(asked.tasks, asked.folder)
                loaded = _agreed(lambda task=task, tasks=tasks: tasks.load(task), ranks)  # type: ignore[misc]
                scores.append(_score(bench, task, loaded, path))
                asked_now.append(scores[-1])
            except DataError as error:
                say(f"  {error}")
                missing.append(task.name)
                continue
            say(f"  {task.name}: {_said(scores[-1])}, {scores[-1].samples:,} samples, {scores[-1].seconds:.1f} s")
        if examples and not should_stop() and not _everywhere(has_example_generations(checkpoint, bench.record), ranks):
            save_example_generations(bench.opened())
        bench.close()
    if ranks.rank == 0 and asked_now:
        _chart(bench, asked, scores, asked_now, whole=len(scores) == len(asked.tasks))
    barrier()
    return scores, missing


def evaluate_all(
    paths: Sequence[Path], ranks: ProcessInfo, asked: EvalRequest, *, log: Callable[[str], None]
) -> tuple[dict[str, list[Score]], list[str]]:
    """Scores of several checkpoints by their names, and the tasks that some of them lack; collective.

    Args:
        paths: checkpoints, or runs, of which the ends of all stages are meant.

    Raises:
        CheckpointError: a folder is neither.
        ConfigError: the harness is not installed, or has no such task.
    """
    checkpoints = [checkpoint for path in paths for checkpoint in stage_ends(path)]
    open_tasks(asked.tasks, asked.folder)
    found, lacking = {}, set[str]()
    for checkpoint in checkpoints:
        if ranks.rank == 0:
            log(f"{checkpoint}")
        scores, missing = evaluate(checkpoint, ranks, asked, log=log)
        found[str(checkpoint)] = scores
        lacking.update(missing)
    columns = {name: [score for score in scores if score.task not in lacking] for name, scores in found.items()}
    return columns, sorted(lacking)


class _Bench:
    """A checkpoint under examination; its weights are loaded when the first question is put to them."""

    def __init__(self, checkpoint: Path, ranks: ProcessInfo, asked: EvalRequest, verify_checksums: bool) -> None:
        self.checkpoint, self.ranks, self.asked, self._verify_checksums = checkpoint, ranks, asked, verify_checksums
        self.record = manifest.read(checkpoint)
        self.run = run_of(checkpoint)
        self.folder = scores_folder(checkpoint, self.record)
        self._opened: LoadedModel | None = None
        self._model: CheckpointLM | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the answers, as far as it is known without loading anything."""
        return {
            "files": manifest.digest_of_files(self.record),
            "precision": self.asked.precision or precision_of_run(self.checkpoint),
            "tokenizer": self.asked.tokenizer,
            **({"add_bos": True} if self._puts_bos_before_texts() else {}),
            "max_length": self.asked.max_length,
            "harness": version("lm_eval"),
        }

    def _puts_bos_before_texts(self) -> bool:
        """A release's scores depend on its tokenizer's post-processor, which earlier versions left out."""
        if "released" not in self.record:
            return self.record["recipe"].get("tokenizer.add_bos", False) is True
        try:
            words = find_tokenizer(self.record, self.checkpoint, self.asked.tokenizer, find_base_model(self.record))
        except DataError:  # which is raised again when the checkpoint is opened
            return False
        return words is not None and words.add_bos

    def opened(self) -> LoadedModel:
        """The checkpoint, loaded."""
        if self._opened is None:
            asked = self.asked
            self._opened = open_checkpoint(
                self.checkpoint,
                self.ranks,
                precision=asked.precision,
                tokenizer=asked.tokenizer,
                max_length=asked.max_length,
                sharded=asked.sharded,
                batch_tokens=asked.batch_tokens,
                verify_checksums=self._verify_checksums,
            )
        return self._opened

    def ask(self, loaded: Any, task: Task) -> Answers:
        """Put a task's questions to the checkpoint."""
        from titan_cpt.evaluation.lm_eval import CheckpointLM, ask

        if self._model is None:
            self._model = CheckpointLM(self.opened())
        try:
            return ask(self._model, loaded, task, self.asked.limit)
        except (TitanError, KeyboardInterrupt):
            raise
        except Exception as error:  # of a task's own code, or of the device; other tasks may still be possible
            raise DataError(f"task {task.name}: cannot be asked: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Give the memory back; a training run has the collector switched off."""
        self._opened = self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _score(bench: _Bench, task: Task, loaded: Any, path: Path) -> Score:
    began = time.perf_counter()
    answers = bench.ask(loaded, task)
    metric = task.metric or next(iter(answers.metrics))
    if metric not in answers.metrics:
        raise DataError(f"task {task.name}: has no metric {metric!r}; it has {', '.join(answers.metrics)}")
    record = bench.record
    score = Score(
        task=task.name,
        metric=metric,
        **asdict(answers),
        limit=bench.asked.limit,
        identity=bench.identity,
        checkpoint=str(bench.checkpoint),
        stage=str(record["stage"]) if bench.run is not None else "",
        stage_index=int(record["stage_index"]),
        steps_done=int(record["steps_done"]),
        run_step=int(record["run_step"]),
        seconds=time.perf_counter() - began,
    )
    if bench.ranks.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **asdict(score), "per_sample": _short(score.per_sample)})
        write_text_atomically(path, text)
    return score


def _short(per_sample: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """0 and 1 in the place of 0.0 and 1.0, of which there are hundreds of thousands."""
    return {
        metric: [int(value) if value == int(value) else value for value in values]
        for metric, values in per_sample.items()
    }


def _kept(path: Path, bench: _Bench, task: Task) -> tuple[Score | None, str]:
    """The score of an earlier evaluation, if the same weights were asked the same in the same way."""
    try:
        score = read_score(path)
    except DataError:
        return None, ""  # none yet, or damaged: it is made again
    except AccessError as error:
        return None, str(error)
    if score.identity != bench.identity or (task.metric or score.metric) not in score.metrics:
        return None, ""
    return replace(score, metric=task.metric or score.metric), ""


def _chart(bench: _Bench, asked: EvalRequest, scores: Sequence[Score], new: Sequence[Score], *, whole: bool) -> None:
    """The suite's average on disk; it and the new scores in the run's TensorBoard, if it has one."""
    mean, error = average_score(scores)
    if asked.suite and whole:
        values = {
            score.task: {"metric": score.metric, "value": score.value, "stderr": score.stderr} for score in scores
        }
        summary = {"suite": asked.suite, "limit": asked.limit, "average": mean, "stderr": error, "tasks": values}
        name = f"{asked.suite}{'' if asked.limit is None else f'-limit{asked.limit}'}.json"
        write_text_atomically(bench.folder / name, json.dumps(summary, indent=1))
    if bench.run is None or not (bench.run / TENSORBOARD_FOLDER).is_dir():
        return
    from torch.utils.tensorboard import SummaryWriter  # half a second

    writer = SummaryWriter(str(bench.run / TENSORBOARD_FOLDER))
    step = int(bench.record["run_step"])
    for score in new:
        writer.add_scalar(f"evaluation/{score.task}/{score.metric}", score.value, step)
    if asked.suite and whole:
        writer.add_scalar(f"evaluation/{asked.suite}/average", mean, step)
    writer.close()


def _agreed(load: Callable[[], Any], ranks: ProcessInfo) -> Any:
    """What every rank loads; if one cannot, none goes on, since they would wait for each other."""
    failure: DataError | None = None
    try:
        loaded = load()
    except DataError as error:
        failure = error
    if ranks.world_size > 1:
        failed = torch.tensor(int(failure is not None))
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed.item() and failure is None:
            failure = DataError("another rank could not load the dataset of a task")
    if failure is not None:
        raise failure
    return loaded


def _everywhere(found: bool, ranks: ProcessInfo) -> bool:
    """Whether every rank has found it; else all of them go to work."""
    if ranks.world_size == 1:
        return found
    lacking = torch.tensor(int(not found))
    dist.all_reduce(lacking, op=dist.ReduceOp.MAX)
    return not lacking.item()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random numbers go on afterwards as if nobody had drawn any; within it they begin at the same place every time."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _said(score: Score) -> str:
    error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
    return f"{score.metric} {score.value:.4f}{error}"


def _nothing(_line: str) -> None:
    pass
