"""The run, read from top to bottom: run -> train -> transition -> train_stage -> train_step.

Everything that can be a function of the step is one (LR, batch, mixture: the plan's). What is left is state: weights,
moments, and how many steps were taken.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from titan_cpt import checkpoint as ckpt
from titan_cpt.checkpoint import Found, load_state
from titan_cpt.config import Config
from titan_cpt.data.loader import StageLoader
from titan_cpt.data.materialise import materialise
from titan_cpt.display import make_console
from titan_cpt.distributed.mesh import Ranks, join_ranks, leave_ranks, wait_for_all
from titan_cpt.errors import NumericsError
from titan_cpt.initial import load_initial
from titan_cpt.manifest import write_text_atomically
from titan_cpt.optimizer import clip_grad_norm, reset_state, set_hyperparameters, set_lr
from titan_cpt.parts import Parts, build
from titan_cpt.plan import StagePlan, fingerprint
from titan_cpt.report import print_summary, summarise
from titan_cpt.run_folder import StopRequest, locked

_THEIR_WARNINGS = (
    "'set_vital' is deprecated",  # torchdata's loader, of torch
    "torch.distributed is disabled, unavailable or uninitialized",  # DCP in a single process, which is what we mean
)

STOPPED_EARLY = 75  # a queue may start the same command again


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, still on the device: mean loss in nats per token, gradient norm before clipping."""

    loss: Tensor
    grad_norm: Tensor


def run(config: Config) -> int:
    """Train what is not trained yet; returns the exit status (0 done, 75 stopped early with everything saved).

    Raises:
        TitanError: the user's mistake, or numbers that are not finite; the newest checkpoint is whole.
    """
    for message in _THEIR_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    ranks = join_ranks()
    try:
        return run_among(ranks, config)
    finally:
        leave_ranks()


def run_among(ranks: Ranks, config: Config) -> int:
    """As `run`, among ranks that have joined already and stay joined."""
    folder = Path(config.job.output_dir) / config.job.name
    with locked(folder, rank=ranks.rank), StopRequest() as stop:
        if ranks.rank == 0:
            materialise(config)
        wait_for_all()
        parts, found = build(config, ranks, folder, stop)
        try:
            return train(parts, found)
        finally:
            parts.log.close()


def train(parts: Parts, found: Found | None) -> int:
    """Every stage that is not done yet, in order."""
    parts.log.event("start", fingerprint=parts.plan.fingerprint, world_size=parts.plan.world_size)
    first = 0
    if found is not None:
        first = found.manifest["stage_index"]
        if found.manifest["steps_done"] == parts.plan.stages[first].steps:
            first, found = first + 1, None
    for stage in parts.plan.stages[:first]:
        parts.log.event("skip", stage=stage.name)
        parts.display.say(f"stage {stage.name}: already trained, skipped")
    for stage in parts.plan.stages[first:]:
        done = resume(parts, found) if found is not None else transition(parts, stage)
        found = None
        done = train_stage(parts, stage, done)
        write_summary(parts)
        unfinished = done < stage.steps or stage is not parts.plan.stages[-1]
        if parts.stop.agreed() and unfinished:
            parts.checkpoints.wait()
            parts.log.event("stop", stage=stage.name, step=done, signal=parts.stop.name)
            parts.display.say(f"stopped by {parts.stop.name}; everything is saved, the same command goes on from here")
            return STOPPED_EARLY
    parts.checkpoints.wait()
    _tell_the_end(parts)
    return 0


def resume(parts: Parts, found: Found) -> int:
    """Take a stage up where a checkpoint left it; returns the steps done."""
    stage, done = parts.plan.stage(found.manifest["stage"]), int(found.manifest["steps_done"])
    load_state(found.folder, parts.model, parts.optimizer)
    _use_numbers(parts, stage)
    parts.log.event("resume", stage=stage.name, step=done, folder=str(found.folder))
    parts.display.say(f"stage {stage.name}: goes on after step {done:,} of {stage.steps:,}, from {found.folder}")
    return done


def transition(parts: Parts, stage: StagePlan) -> int:
    """Begin a stage: weights from `init`, the optimizer reset or kept, the new stage's numbers; 0 steps are done."""
    parts.checkpoints.wait()
    weights = load_initial(parts, stage)
    if not stage.keep_optimizer:
        reset_state(parts.optimizer)
    _use_numbers(parts, stage)
    carried = {
        "weights": weights,
        "optimizer": "moments and step count kept" if stage.keep_optimizer else "reset",
        "lr": f"{stage.lr_at(0):.4g} at the first step",
        "data": dict(sorted(stage.before.trained.items())),
        "replay": dict(sorted(stage.before.replayed.items())),
    }
    parts.log.event("transition", stage=stage.name, step=0, **carried)
    parts.display.say(f"stage {stage.name} begins")
    for what, value in carried.items():
        if value:
            parts.display.say(f"  {what:<9} {value}")
    return 0


def train_stage(parts: Parts, stage: StagePlan, done: int) -> int:
    """Steps `done` to the stage's end, or to a signal, measured and saved on the way; returns the steps done."""
    plan, config = parts.plan, parts.config
    loader = StageLoader(
        parts.reader,
        partial(plan.batch, stage),  # no lambda: where reading processes are not forked, it is pickled
        steps=stage.steps,
        first_step=done,
        accumulation=plan.accumulation,
        local_batch=plan.local_batch_size,
        rank=parts.mesh.data_rank,
        workers=config.training.num_workers,
    )
    parts.display.begin_stage(stage, done)
    if done == 0:
        validate(parts, stage, 0)
        if stage.pre_anneal_step == 0:
            save(parts, stage, 0, ckpt.PRE_ANNEAL)
    gc.disable()  # ranks that collect at different times wait for each other
    for step in range(done, stage.steps):
        result = train_step(parts, loader, stage, step)
        record(parts, stage, step, result)
        done = step + 1
        last, stopping = done == stage.steps, parts.stop.agreed()
        measured = last or done % config.validation.interval == 0 or done in stage.final_window
        saved = _save_kind(stage, done, config.checkpoint.interval, stopping=stopping)
        if measured or saved or done % config.metrics.log_freq == 0:
            show(parts, stage, done)
        if measured:
            validate(parts, stage, done)
        if saved:
            save(parts, stage, done, saved)
        if step % config.training.gc_freq == 0:
            gc.collect(1)
        if stopping:
            break
    parts.display.end_stage()
    return done


def train_step(parts: Parts, loader: StageLoader, stage: StagePlan, step: int) -> StepResult:
    """One optimizer step: accumulate, reduce, clip, update. A loss or gradient that is not finite changes no weight."""
    plan, model, optimizer = parts.plan, parts.model, parts.optimizer
    loss = torch.zeros((), device=parts.ranks.device)
    for micro in range(plan.accumulation):
        inputs_BL, targets_BL = loader.batch(step, micro)
        loss += parts.engine.backward(inputs_BL, targets_BL, plan.step_tokens)  # a share of the global batch's mean
    loss = parts.mesh.summed_shares(loss)
    grad_norm = clip_grad_norm(model, parts.config.training.max_norm, parts.mesh.pipeline)
    parts.guard.observe(loss, grad_norm)
    set_lr(optimizer, stage.lr_at(step))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm)


def record(parts: Parts, stage: StagePlan, step: int, result: StepResult) -> None:
    """Keep a step for metrics.jsonl; the device is not waited for."""
    plan = parts.plan
    run_step = plan.steps_before(stage) + step + 1
    draws = plan.batch(stage, step) if parts.ranks.rank == 0 else []
    numbers = {
        "stage": stage.name,
        "step": step + 1,
        "run_step": run_step,
        "tokens": run_step * plan.step_tokens,
        "replayed_tokens": sum(draw.replayed for draw in draws) * plan.seq_len,
        "lr": parts.optimizer.param_groups[0]["lr"],
        "batch_hash": parts.reader.batch_hash(draws),
    }
    parts.log.step(numbers, loss=result.loss, grad_norm=result.grad_norm, tokens=plan.step_tokens)


def show(parts: Parts, stage: StagePlan, done: int) -> None:
    """Bring what was kept to the disk and the screen.

    Raises:
        NumericsError: a loss or a gradient since the last call was not finite.
        CheckpointError: a save in the background failed.
    """
    lines = parts.log.flush()
    for line in lines:
        if not (math.isfinite(line["loss_nats_per_token"]) and math.isfinite(line["grad_norm"])):
            _stop_before(parts, stage, line)
    if lines:
        parts.display.step(stage, lines[-1])
    parts.checkpoints.poll()


def _stop_before(parts: Parts, stage: StagePlan, bad: dict[str, Any]) -> NoReturn:
    """Save the weights as they were before a step whose numbers are not finite, which they still are, and stop."""
    done = bad["step"] - 1
    if done and _save_kind(stage, done, parts.config.checkpoint.interval, stopping=False) is None:
        save(parts, stage, done, ckpt.INTERVAL)  # else it was saved before that step, perhaps as the pre-anneal point
    parts.checkpoints.wait()
    newest = next((str(found.folder) for found in parts.checkpoints.listed()), "none, as it was the first step")
    raise NumericsError(
        f"stage {stage.name}, step {done} (counted from 0): the loss is {bad['loss_nats_per_token']}, the gradient "
        f"norm {bad['grad_norm']}. No weight was changed by it or since; newest checkpoint: {newest}. Look at the "
        f"batch with `titan-cpt plan --recipe {stage.name} {done}`; to train the stage again with another LR, change "
        f"it and remove {parts.folder / stage.name}"
    )


def validate(parts: Parts, stage: StagePlan, done: int) -> None:
    """Measure every dataset and write down its loss, and how much of it was forgotten."""
    plan, run_step = parts.plan, parts.plan.steps_before(stage) + done
    losses = parts.validator.measure(parts.engine)
    said = []
    for dataset, loss in losses.items():
        since = plan.forgetting_since(stage, dataset)
        if done == 0:
            parts.log.before[stage.name, dataset] = loss.nats_per_token
        before = None if since is None else parts.log.before.get((since, dataset))
        forgetting = None if before is None else loss.nats_per_token - before
        line = {
            "stage": stage.name,
            "step": done,
            "dataset": dataset,
            "loss_nats_per_token": loss.nats_per_token,
            "perplexity": loss.perplexity,
            "bits_per_byte": loss.bits_per_byte,
            "forgetting_nats_per_token": forgetting,
        }
        parts.log.validation(line, run_step)
        said.append(f"{dataset} {loss.nats_per_token:.4f}" + ("" if forgetting is None else f" ({forgetting:+.4f})"))
    if said:
        parts.display.say(f"  validation after step {done:,} of {stage.name}: {', '.join(said)}")
    parts.log.restart_clock()


def save(parts: Parts, stage: StagePlan, done: int, kind: str) -> None:
    """Begin a checkpoint of this moment; it exists once its manifest is written."""
    plan, index = parts.plan, parts.plan.stages.index(stage)
    recipe = plan.recipe_until(index)
    parts.checkpoints.save(
        parts.model,
        parts.optimizer,
        stage=stage.name,
        steps_done=done,
        record={
            "stage_index": index,
            "kind": kind,
            "run_step": plan.steps_before(stage) + done,
            "recipe": recipe,
            "fingerprint": fingerprint(recipe),
            "data": parts.identities,
            "world_size": plan.world_size,
            "python": platform.python_version(),
        },
    )
    if kind == ckpt.PRE_ANNEAL:
        parts.log.event("anneal", stage=stage.name, step=done)
        parts.display.say(f"  annealing begins; the checkpoint before it stays at step {done:,} of {stage.name}")
    parts.log.restart_clock()


def _save_kind(stage: StagePlan, done: int, interval: int, *, stopping: bool) -> str | None:
    if done == stage.steps:
        return ckpt.STAGE_END
    if done == stage.pre_anneal_step:
        return ckpt.PRE_ANNEAL
    return ckpt.INTERVAL if stopping or done % interval == 0 else None


def _use_numbers(parts: Parts, stage: StagePlan) -> None:
    """The stage's optimizer numbers, after any state was loaded: a loaded state brings the old stage's with it."""
    numbers = stage.optimizer
    set_hyperparameters(parts.optimizer, betas=numbers.betas, eps=numbers.eps, weight_decay=numbers.weight_decay)
    set_lr(parts.optimizer, stage.lr_at(0))


def write_summary(parts: Parts) -> None:
    """summary.json of all stages so far."""
    if parts.ranks.rank == 0:
        write_text_atomically(parts.folder / "summary.json", json.dumps(summarise(parts.folder), indent=1))


def _tell_the_end(parts: Parts) -> None:
    if parts.ranks.rank == 0:
        print_summary(summarise(parts.folder), make_console())
    parts.display.say(f"this table again: titan-cpt report {parts.folder}")
    if parts.config.metrics.enable_tensorboard:
        parts.display.say(f"the curves: tensorboard --logdir {parts.folder / 'tb'}")
