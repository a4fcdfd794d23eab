"""Decides which actions are due after a step: pure functions of the config, the stage and the number of steps done."""

from __future__ import annotations

from dataclasses import dataclass

from titan_cpt.common.run_folder import INTERVAL, PRE_ANNEAL, STAGE_END
from titan_cpt.config.schema import Config
from titan_cpt.planning.plan import StagePlan


@dataclass(frozen=True)
class ActionsDue:
    """The actions of the training loop after a step, in this order.

    Attributes:
        log: read the metrics from the device and write them; due before everything else, so that a bad step is known.
        copies: take a copy of the weights, see training/weights/.
        validation: measure the validation loss of every dataset.
        checkpoint: save a checkpoint of this kind; None for no checkpoint.
        benchmarks: run the benchmark suite on the checkpoint just saved.
        garbage_collection: run Python's garbage collector.
        stop: end the run, with everything saved.
    """

    log: bool
    copies: bool
    validation: bool
    checkpoint: str | None
    benchmarks: bool
    garbage_collection: bool
    stop: bool


def actions_due(config: Config, stage: StagePlan, steps_done: int, *, stop: bool) -> ActionsDue:
    """The actions that are due after `steps_done` steps of a stage.

    Args:
        steps_done: at least 1.
        stop: a signal requested a stop.
    """
    at_end = steps_done == stage.steps
    validation = at_end or steps_done % config.validation.interval == 0 or steps_done in stage.final_window
    benchmarks = benchmarks_due(config, stage, steps_done)
    checkpoint = checkpoint_due(config, stage, steps_done)
    if checkpoint is None and (stop or benchmarks):
        checkpoint = INTERVAL
    copies = stage.copies_due(steps_done)
    return ActionsDue(
        log=validation or copies or checkpoint is not None or steps_done % config.metrics.log_freq == 0,
        copies=copies,
        validation=validation,
        checkpoint=checkpoint,
        benchmarks=benchmarks,
        garbage_collection=(steps_done - 1) % config.training.gc_freq == 0,
        stop=stop,
    )


def checkpoint_due(config: Config, stage: StagePlan, steps_done: int) -> str | None:
    """The kind of checkpoint that the config and the LR schedule require after these steps; None for no checkpoint."""
    if steps_done == stage.steps:
        return STAGE_END
    if steps_done == stage.pre_anneal_step:
        return PRE_ANNEAL
    return INTERVAL if steps_done % config.checkpoint.interval == 0 else None


def benchmarks_due(config: Config, stage: StagePlan, steps_done: int) -> bool:
    """Whether `[evaluation]` schedules its benchmark suite for the checkpoint after these steps."""
    evaluation = config.evaluation
    if evaluation.suite is None or steps_done == 0:
        return False
    if evaluation.at_stage_end and steps_done == stage.steps:
        return True
    return evaluation.every is not None and steps_done % evaluation.every == 0
