"""The run, read from top to bottom: run -> train -> transition -> train_stage -> train_step.

Everything that can be a function of the step is one (LR, batch, mixture: the plan's). What is left is state: weights,
moments, and how many steps were taken.
"""

from __future__ import annotations

import gc
import json
import os
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from titan_cpt.checkpoint.manager import FoundCheckpoint
from titan_cpt.checkpoint.state_dict import load_state
from titan_cpt.common.console import make_console
from titan_cpt.common.exit_status import STOPPED_EARLY
from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.run_folder import INTERVAL, PRE_ANNEAL, STAGE_END, SUMMARY_FILE, locked
from titan_cpt.common.signals import StopRequest
from titan_cpt.config.run_config import require_own_run
from titan_cpt.config.schema import Config
from titan_cpt.data.loader import StageLoader
from titan_cpt.data.prepare.prepare_missing import prepare_missing_data_unless_stopped
from titan_cpt.distributed.float8 import refresh_scales
from titan_cpt.distributed.process_group import (
    ProcessInfo,
    any_rank_stops,
    destroy_process_group,
    init_process_group,
    rank_0_first,
    set_timeouts,
)
from titan_cpt.errors import NumericsError
from titan_cpt.planning.plan import StagePlan
from titan_cpt.reporting.summary import print_summary, summarize
from titan_cpt.training import bad_steps
from titan_cpt.training.allocator import keep_freed_memory
from titan_cpt.training.benchmarks import benchmarks_due, require_benchmarks, take_benchmarks
from titan_cpt.training.build import build, manifest_record
from titan_cpt.training.forgetting import note_changed_validation, renew_baselines
from titan_cpt.training.initial_weights import load_initial
from titan_cpt.training.metrics import versions
from titan_cpt.training.optimizer import clip_grad_norm, reset_state, set_hyperparameters, set_lr
from titan_cpt.training.state import Parts
from titan_cpt.training.step_log import StepResult, record, validate

_THEIR_WARNINGS = (
    "'set_vital' is deprecated",  # torchdata's loader, of torch
    "torch.distributed is disabled, unavailable or uninitialized",  # DCP in a single process, which is what we mean
    "Warning: Profiler clears events at the end of each cycle",  # which is why every trace is written at once
    "FSDP2-wrapped module .* returned a view tensor",  # a hint for models that go on in place, which ours do not
)

SLOW_SAVE_S = 10.0


def run(config: Config) -> int:
    """Train what is not trained yet; returns the exit status (0 done, 75 stopped early with everything saved).

    Raises:
        TitanError: the user's mistake, or numbers that are not finite; the newest checkpoint is whole.
    """
    for message in _THEIR_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    keep_freed_memory()
    if config.job.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch refuses cuBLAS; read when CUDA begins
    ranks = init_process_group(config.comm.init_timeout_seconds)
    try:
        return run_among(ranks, config)
    finally:
        destroy_process_group()


def run_among(ranks: ProcessInfo, config: Config) -> int:
    """As `run`, among ranks that have joined already and stay joined."""
    folder = Path(config.job.output_dir) / config.job.name
    with ExitStack() as stack:
        with rank_0_first():
            if ranks.rank == 0:
                require_own_run(folder, config)
            stack.enter_context(locked(folder, rank=ranks.rank))
            stop = stack.enter_context(StopRequest())
            prepare_missing_data_unless_stopped(config, stop, rank=ranks.rank)
        if any_rank_stops(stop):
            return STOPPED_EARLY
        parts, found = build(config, ranks, folder, stop)
        try:
            return train(parts, found)
        finally:
            parts.profiler.close()
            parts.log.close()


def train(parts: Parts, found: FoundCheckpoint | None) -> int:
    """Every stage that is not done yet, in order."""
    first = done = 0
    if found is not None:
        first, done = found.manifest["stage_index"], found.manifest["steps_done"]
    note_changed_validation(parts, parts.plan.stages[first], done)
    told = {"data": parts.identities, "validation": parts.validator.identities}
    told |= {"versions": versions(parts.ranks.device)}
    parts.log.event("start", fingerprint=parts.plan.fingerprint, world_size=parts.plan.world_size, **told)
    if found is not None and done == parts.plan.stages[first].steps and not found.manifest.get("validation_due"):
        first, found = first + 1, None
    require_benchmarks(parts.config, fresh=first == 0 and found is None)
    for stage in parts.plan.stages[:first]:
        parts.log.event("skip", stage=stage.name)
        parts.display.say(f"stage {stage.name}: already trained, skipped")
        if benchmarks_due(parts.config, stage, stage.steps) and not take_benchmarks(parts, stage, stage.steps):
            return _stopped(parts, stage, stage.steps)
    if first < len(parts.plan.stages):
        renew_baselines(parts, parts.plan.stages[first], resumes=found is not None)
    for stage in parts.plan.stages[first:]:
        done = resume(parts, found) if found is not None else transition(parts, stage)
        unmeasured = found is None or bool(found.manifest.get("validation_due"))
        found = None
        done, whole = train_stage(parts, stage, done, unmeasured=unmeasured)
        write_summary(parts)
        unfinished = done < stage.steps or not whole or stage is not parts.plan.stages[-1]
        if any_rank_stops(parts.stop) and unfinished:
            return _stopped(parts, stage, done)
    parts.checkpoints.wait()
    _tell_the_end(parts)
    return 0


def _stopped(parts: Parts, stage: StagePlan, done: int) -> int:
    parts.checkpoints.wait()
    parts.log.event("stop", stage=stage.name, step=done, signal=parts.stop.name)
    parts.display.say(f"stopped by {parts.stop.name}; everything is saved, the same command resumes from here")
    _tell_newest_checkpoint(parts)
    return STOPPED_EARLY


def resume(parts: Parts, found: FoundCheckpoint) -> int:
    """Take a stage up where a checkpoint left it; returns the steps done."""
    stage, done = parts.plan.stage(found.manifest["stage"]), int(found.manifest["steps_done"])
    load_state(found.folder, parts.model, parts.optimizer)
    _use_numbers(parts, stage)
    parts.skips.recall(found.manifest.get("skipped"))
    parts.guard.recall(found.manifest.get("recent_losses", ()))
    parts.log.event("resume", stage=stage.name, step=done, folder=str(found.folder))
    parts.log.rewind(parts.plan.steps_before(stage) + done)
    parts.display.say(f"stage {stage.name}: resumes after step {done:,} of {stage.steps:,}, from {found.folder}")
    return done


def transition(parts: Parts, stage: StagePlan) -> int:
    """Begin a stage: weights from `init`, the optimizer reset or kept, the new stage's numbers; 0 steps are done."""
    parts.checkpoints.wait()
    weights = load_initial(parts, stage)
    if not stage.keep_optimizer:
        reset_state(parts.optimizer)
    _use_numbers(parts, stage)
    parts.guard.recall(())
    carried = {
        "weights": weights,
        "optimizer": "moments and step count kept" if stage.keep_optimizer else "reset",
        "lr": f"{stage.lr_at(0):.4g} at the first step",
    }
    used = {"data": dict(sorted(stage.history.trained.items())), "replay": dict(sorted(stage.history.replayed.items()))}
    parts.log.event("transition", stage=stage.name, step=0, **carried, **used)
    parts.log.rewind(parts.plan.steps_before(stage))
    parts.display.transition(stage, carried)
    return 0


def train_stage(parts: Parts, stage: StagePlan, done: int, *, unmeasured: bool = True) -> tuple[int, bool]:
    """Steps `done` to the stage's end, or to a signal, measured and saved on the way.

    Args:
        unmeasured: validation is due before the first of them.

    Returns:
        The steps done, and whether everything due by then was measured: a signal cuts validation short.
    """
    config, loader, due = parts.config, open_loader(parts, stage, done), False
    first_step = done
    parts.display.begin_stage(stage, done)
    if unmeasured and not validate(parts, stage, done):
        return done, False
    if benchmarks_due(config, stage, done) and not take_benchmarks(parts, stage, done):
        return done, False
    if done == 0 == stage.pre_anneal_step:
        save(parts, stage, 0, PRE_ANNEAL)
    gc.disable()  # ranks that collect at different times wait for each other
    while done < stage.steps:
        step, taken = done, pass_over if parts.skips.holds(stage.name, done) else train_step
        record(parts, stage, step, taken(parts, loader, stage, step))
        done = step + 1
        last, stopping = done == stage.steps, any_rank_stops(parts.stop)
        if step == first_step:  # by now every rank has compiled and taken it
            set_timeouts(config.comm.train_timeout_seconds)
        measured = last or done % config.validation.interval == 0 or done in stage.final_window
        evaluated = benchmarks_due(config, stage, done)
        saved = _save_kind(stage, done, config.checkpoint.interval, stopping=stopping or evaluated)
        if measured or saved or done % config.metrics.log_freq == 0:
            held_back = show(parts, stage, done)
            if held_back is not None:
                done = mend(parts, stage, held_back)
                loader = open_loader(parts, stage, done)
                continue
        due = measured and not validate(parts, stage, done)
        if saved or due:
            save(parts, stage, done, saved or INTERVAL, validation_due=due)
        due = due or (evaluated and (stopping or not take_benchmarks(parts, stage, done)))
        if step % config.training.gc_freq == 0:
            gc.collect(1)
        parts.profiler.step(stage.name, done)
        if stopping or due:
            break
    parts.display.end_stage()
    return done, not due


def open_loader(parts: Parts, stage: StagePlan, first_step: int) -> StageLoader:
    """This rank's micro-batches from a step on."""
    return StageLoader(
        parts.reader,
        partial(parts.plan.batch, stage),  # no lambda: where reading processes are not forked, it is pickled
        steps=stage.steps,
        first_step=first_step,
        accumulation=parts.plan.gradient_accumulation_steps,
        local_batch=parts.plan.local_batch_size,
        rank=parts.mesh.data_rank,
        workers=parts.config.training.num_workers,
    )


def train_step(parts: Parts, loader: StageLoader, stage: StagePlan, step: int) -> StepResult:
    """One optimizer step: accumulate, reduce, clip, update. A loss or gradient that is not finite changes no weight."""
    plan, model, optimizer = parts.plan, parts.model, parts.optimizer
    loss = torch.zeros((), device=parts.ranks.device)
    for micro in range(plan.gradient_accumulation_steps):
        inputs_BL, targets_BL = loader.batch(step, micro)
        loss += parts.engine.backward(inputs_BL, targets_BL, plan.step_tokens)  # a share of the global batch's mean
    loss = parts.mesh.sum_loss(loss)
    grad_norm = clip_grad_norm(model, parts.config.training.max_norm, parts.mesh.pipeline)
    loss = loss.to(grad_norm.device)  # the host's, where parameters are offloaded to it
    health = parts.guard.observe(loss, grad_norm)
    set_lr(optimizer, stage.lr_at(step))
    optimizer.step()
    if parts.config.float8.enable_fsdp_float8_all_gather:
        refresh_scales(model)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, health)


def pass_over(parts: Parts, loader: StageLoader, stage: StagePlan, step: int) -> StepResult:
    """A step whose batch is read and not used: the schedule and the data go on, weights and moments stay."""
    for micro in range(parts.plan.gradient_accumulation_steps):
        loader.batch(step, micro)
    set_lr(parts.optimizer, stage.lr_at(step))
    nothing = torch.full((), torch.nan, device=parts.ranks.device)
    return StepResult(nothing, nothing, None)


def show(parts: Parts, stage: StagePlan, done: int) -> dict[str, Any] | None:
    """Bring what was kept to the disk and the screen; returns the first step that the guard held back, if any."""
    lines = parts.log.flush()
    held_back = bad_steps.first_held_back(parts, stage, lines)
    if held_back is None and lines:
        parts.display.step(stage, lines[-1])
    if parts.log.trouble:
        parts.display.say(f"  {parts.log.trouble}")
    parts.checkpoints.poll()
    return held_back


def mend(parts: Parts, stage: StagePlan, bad: dict[str, Any]) -> int:
    """Answer numbers that are bad as the config asks; returns the step from which the stage goes on.

    Raises:
        NumericsError: it asks to stop, or too many batches were passed over; the weights are those before that step.
    """
    answer = bad_steps.answer(parts, stage, bad)
    if answer == "stop":
        _stop_before(parts, stage, bad)
    bad_steps.pass_over(parts, stage, bad)
    if answer == "skip":
        parts.log.rewind(int(bad["run_step"]) - 1)
        return int(bad["step"]) - 1
    parts.checkpoints.wait()
    found = parts.checkpoints.newest_valid(parts.display.say)
    here = found is not None and found.manifest["stage"] == stage.name
    return resume(parts, found) if found is not None and here else transition(parts, stage)


def _stop_before(parts: Parts, stage: StagePlan, bad: dict[str, Any]) -> NoReturn:
    """Save the weights as they were before a step whose numbers are bad, which they still are, and stop."""
    done = bad["step"] - 1
    if done and _save_kind(stage, done, parts.config.checkpoint.interval, stopping=False) is None:
        save(parts, stage, done, INTERVAL)  # else it was saved before that step, perhaps as the pre-anneal point
    parts.checkpoints.poll(until_done=True)
    newest = next((str(found.folder) for found in parts.checkpoints.listed()), "none, as it was the first step")
    parts.log.event("stop", stage=stage.name, step=done, why=bad_steps.reason(bad))
    raise NumericsError(bad_steps.complaint(parts, stage, bad, newest))


def save(parts: Parts, stage: StagePlan, done: int, kind: str, *, validation_due: bool = False) -> None:
    """Begin a checkpoint of this moment; it exists once its manifest is written."""
    record = {**manifest_record(parts, stage, done, kind), "validation_due": validation_due}
    parts.checkpoints.save(parts.model, parts.optimizer, stage=stage.name, steps_done=done, record=record)
    if parts.checkpoints.waited_s > SLOW_SAVE_S:
        parts.display.say(
            f"  training waited {parts.checkpoints.waited_s:.0f} s for the checkpoint before this one to be written; "
            "a longer checkpoint.interval or a faster disk would spare that"
        )
    if kind == PRE_ANNEAL:
        parts.log.event("anneal", stage=stage.name, step=done)
        parts.display.say(f"  annealing begins; the checkpoint before it stays at step {done:,} of {stage.name}")
    parts.log.restart_clock()


def _save_kind(stage: StagePlan, done: int, interval: int, *, stopping: bool) -> str | None:
    if done == stage.steps:
        return STAGE_END
    if done == stage.pre_anneal_step:
        return PRE_ANNEAL
    return INTERVAL if stopping or done % interval == 0 else None


def _use_numbers(parts: Parts, stage: StagePlan) -> None:
    """The stage's optimizer numbers, after any state was loaded: a loaded state brings the old stage's with it."""
    if parts.config.float8.enable_fsdp_float8_all_gather:
        refresh_scales(parts.model)
    numbers = stage.optimizer
    set_hyperparameters(parts.optimizer, betas=numbers.betas, eps=numbers.eps, weight_decay=numbers.weight_decay)
    set_lr(parts.optimizer, stage.lr_at(0))


def write_summary(parts: Parts) -> None:
    """summary.json of all stages so far."""
    if parts.ranks.rank == 0:
        write_text_atomically(parts.folder / SUMMARY_FILE, json.dumps(summarize(parts.folder), indent=1))


def _tell_the_end(parts: Parts) -> None:
    if parts.ranks.rank == 0:
        print_summary(summarize(parts.folder), make_console())
    _tell_newest_checkpoint(parts)
    parts.display.say(f"this table again: titan-cpt report {parts.folder}")
    if parts.config.metrics.enable_tensorboard:
        parts.display.say(f"the curves: tensorboard --logdir {parts.folder / 'tb'}")


def _tell_newest_checkpoint(parts: Parts) -> None:
    newest = next((found.folder for found in parts.checkpoints.listed()), None) if parts.ranks.rank == 0 else None
    if newest is not None:
        parts.display.say(f"newest checkpoint: {newest}")
