"""Benchmarks inside training, as [evaluation] asks: on the checkpoint just saved, never on the run's own model.

So a run's losses are the same bits with benchmarks and without, and `titan-cpt eval` gives the same scores later.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from titan_cpt.common.reading import is_there
from titan_cpt.common.run_folder import MANIFEST_FILE, checkpoint_folder
from titan_cpt.config.schema import Config, EvaluationConfig
from titan_cpt.config.suites import require_folder, suite_of
from titan_cpt.distributed.process_group import any_rank_stops, barrier
from titan_cpt.evaluation.evaluate import EvalRequest, evaluate, open_tasks
from titan_cpt.evaluation.scores import average_score
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.state import Parts


def require_benchmarks(config: Config, *, fresh: bool) -> None:
    """Find out before any step whether the suite can be asked.

    Args:
        fresh: nothing is trained yet: the questions are fetched as well.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or lacks a task.
        DataError: a task's dataset cannot be loaded.
    """
    asked = config.evaluation
    if asked.suite is None:
        return
    require_folder(suite_of(asked.suite), _folder(asked))
    tasks = open_tasks(suite_of(asked.suite), _folder(asked))
    for task in suite_of(asked.suite) if fresh else ():
        tasks.load(task)


def benchmarks_due(config: Config, stage: StagePlan, done: int) -> bool:
    """Whether the suite is to be asked after so many steps of a stage."""
    asked = config.evaluation
    if asked.suite is None or done == 0:
        return False
    return (asked.at_stage_end and done == stage.steps) or (asked.every is not None and done % asked.every == 0)


def take_benchmarks(parts: Parts, stage: StagePlan, done: int) -> bool:
    """Ask the suite of the checkpoint after so many steps, as far as it was not asked before; collective.

    What goes wrong with a task is told, and training goes on: the scores can be made up for from the checkpoint.

    Returns:
        False where a signal cut it short.
    """
    asked = parts.config.evaluation
    if asked.suite is None:
        return True
    folder = checkpoint_folder(parts.folder, stage.name, done)
    parts.checkpoints.poll(until_done=True)
    barrier()  # rank 0 writes the manifest, which every rank is about to read
    if not is_there(folder / MANIFEST_FILE):
        parts.display.say(f"  {asked.suite} cannot be asked: {folder} was not saved, or is gone")
        return True
    parts.display.say(f"  {asked.suite} after step {done:,} of {stage.name}")
    scores, missing = evaluate(
        folder,
        parts.ranks,
        EvalRequest(
            suite_of(asked.suite),
            suite=asked.suite,
            folder=_folder(asked),
            limit=asked.limit,
            sharded=True,
        ),
        log=parts.display.say,
        examples=True,
        verify_checksums=False,
        should_stop=partial(any_rank_stops, parts.stop),
    )
    told = {score.task: score.value for score in scores}
    if len(scores) == len(suite_of(asked.suite)):
        told["average"] = average_score(scores)[0]
    parts.log.event("evaluation", stage=stage.name, step=done, suite=asked.suite, scores=told, missing=missing)
    parts.log.restart_clock()
    return not any_rank_stops(parts.stop)


def _folder(asked: EvaluationConfig) -> Path | None:
    return None if asked.tasks_dir is None else Path(asked.tasks_dir)
