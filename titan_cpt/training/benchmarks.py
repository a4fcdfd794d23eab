"""Benchmarks during training, configured by [evaluation]. They run on the checkpoint just saved, not on the live model.

Therefore a run's losses are bit for bit the same with and without benchmarks, and `titan-cpt eval` gives the same
scores later.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from titan_cpt.checkpoint.averages import has_average
from titan_cpt.checkpoint.manifest import read as read_manifest
from titan_cpt.common.reading import is_there
from titan_cpt.common.run_folder import MANIFEST_FILE, checkpoint_folder
from titan_cpt.common.weights.named_weights import AVERAGE, NamedWeights
from titan_cpt.config.schema import Config, EvaluationConfig
from titan_cpt.config.suites import require_folder, suite_of
from titan_cpt.distributed.process_group import any_rank_stops, barrier
from titan_cpt.evaluation.evaluate import EvalRequest, evaluate, open_tasks
from titan_cpt.evaluation.scores import average_score
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.state import TrainerState


def require_benchmarks(config: Config, *, fresh: bool) -> None:
    """Check before the first step that the benchmark suite can run.

    Args:
        fresh: the run is new: also load the tasks' datasets, so that a missing one is reported before the first step.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, lacks a task, or evaluation.tasks_dir is needed.
        DataError: a task's dataset cannot be loaded.
    """
    evaluation = config.evaluation
    if evaluation.suite is None:
        return
    require_folder(suite_of(evaluation.suite), _folder(evaluation))
    tasks = open_tasks(suite_of(evaluation.suite), _folder(evaluation))
    for task in suite_of(evaluation.suite) if fresh else ():
        tasks.load(task)


def run_benchmarks(state: TrainerState, stage: StagePlan, steps_done: int) -> bool:
    """Run the benchmark suite, except tasks that already have a score, on the checkpoint of a step; collective.

    The weights are scored, and their average if the checkpoint holds one. If a task fails, `evaluate` prints the error
    and training continues; `titan-cpt eval` can run the task later.

    Returns:
        False if a signal interrupted the suite.
    """
    evaluation = state.config.evaluation
    if evaluation.suite is None:
        return True
    folder = checkpoint_folder(state.folder, stage.name, steps_done)
    state.checkpoints.poll(until_done=True)
    barrier()  # rank 0 writes the manifest, which every rank reads below
    if not is_there(folder / MANIFEST_FILE):
        state.display.warn(f"  {evaluation.suite} is skipped: {folder} was not saved, or was removed")
        return True
    averages = (False, True) if has_average(read_manifest(folder)) else (False,)
    for average in averages:
        _run_suite(state, stage, steps_done, NamedWeights(folder, average))
    state.log.restart_clock()
    return not any_rank_stops(state.stop)


def _run_suite(state: TrainerState, stage: StagePlan, steps_done: int, weights: NamedWeights) -> None:
    """Run the suite on these weights, and log the scores; collective."""
    evaluation = state.config.evaluation
    assert evaluation.suite is not None, "run_benchmarks has checked it"
    whose = " (average)" if weights.average else ""
    state.display.say(f"  {evaluation.suite} after step {steps_done:,} of {stage.name}{whose}")
    scores, missing = evaluate(
        weights,
        state.process,
        EvalRequest(
            suite_of(evaluation.suite),
            suite=evaluation.suite,
            folder=_folder(evaluation),
            limit=evaluation.limit,
            sharded=True,
        ),
        log=state.display.say,
        examples=True,
        verify_checksums=False,
        should_stop=partial(any_rank_stops, state.stop),
    )
    values = {score.task: score.value for score in scores}
    if len(scores) == len(suite_of(evaluation.suite)):
        values["average"] = average_score(scores)[0]
    state.log.event(
        "evaluation",
        stage=stage.name,
        step=steps_done,
        suite=evaluation.suite,
        scores=values,
        missing=missing,
        **({"weights": AVERAGE} if weights.average else {}),
    )


def _folder(evaluation: EvaluationConfig) -> Path | None:
    return None if evaluation.tasks_dir is None else Path(evaluation.tasks_dir)
