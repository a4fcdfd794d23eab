"""`optimizer_state = "warm:N"`: moments for imported weights, from N passes at LR 0 before a stage's first step.

Each pass is an optimizer step, with gradient clipping and the guard, on the batch of one of the stage's first N steps.
Moments and step counts advance as in training, and not one bit of a weight changes. The stage then begins at its first
batch. The state is a function of the initial weights and these batches: a run that ends in between does it again.

A batch with a non-finite loss or gradient is handled as training.on_nonfinite says: the run stops, or the batch is
skipped, here and when training reaches it. Nothing is a loss spike, as no weight changes from pass to pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titan_cpt.common.readable import duration
from titan_cpt.data.loader import StageLoader
from titan_cpt.distributed.float8 import local_values
from titan_cpt.distributed.process_group import any_rank_stops
from titan_cpt.errors import NumericsError
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.bad_steps import choose_response, reason, skip_from_now_on, skip_limit_reached
from titan_cpt.training.forward_backward import StepResult
from titan_cpt.training.state import TrainerState

_REPORTS = 10  # lines of progress, at which the host waits for the device and looks for bad passes

TrainStep = Callable[[StageLoader, StagePlan, int, float], StepResult]


def warm_up(state: TrainerState, stage: StagePlan, steps_done: int, train_step: TrainStep) -> tuple[int, bool]:
    """Warm up the optimizer state, if the stage begins with that.

    Args:
        steps_done: as `begin_stage` returns it: minus the number of passes. Otherwise nothing is done.
        train_step: a step on the next batch of a loader, with this LR.

    Returns:
        The steps done, at least 0; and whether the state is complete. It is not if a signal came: then nothing may be
        saved.

    Raises:
        NumericsError: a loss or gradient is not finite, and training.on_nonfinite is "stop", or too many batches were
            skipped. No weight has changed.
    """
    passes = -steps_done
    if passes <= 0:
        return steps_done, True
    began = time.perf_counter()
    zeros = _negative_zeros(state.model)
    loader = state.open_loader(stage, 0)
    done = 0
    while done < passes:
        until = min(passes, done + -(-passes // _REPORTS))
        lines = _passes(state, stage, loader, range(done, until), train_step)
        if lines is None:
            return 0, False
        bad = next((line for line in lines if line["held_back"]), None)
        if bad is not None:
            _skip_or_stop(state, stage, bad)
            done = bad["step"]
            loader = state.open_loader(stage, done)
            continue
        done = until
        _report(state, f"{done:,} of {passes:,} passes", lines, time.perf_counter() - began)
    for weight, where in zeros:
        weight[where] = -0.0
    state.guard.restore_losses(())
    state.stepper.restart()
    state.log.event("warm_up", stage=stage.name, step=0, passes=passes, seconds=time.perf_counter() - began)
    state.log.restart_clock()
    return 0, True


def _passes(
    state: TrainerState, stage: StagePlan, loader: StageLoader, steps: range, train_step: TrainStep
) -> list[dict[str, Any]] | None:
    """A pass on the batch of each step that is not skipped.

    Returns:
        Loss, gradient norm, and whether the guard prevented the update, of each pass; None if a signal came.
    """
    results: list[tuple[int, StepResult]] = []
    for step in steps:
        if any_rank_stops(state.stop):
            return None
        if state.skipped.in_warm_up(stage.name, step):
            for microbatch in range(state.plan.accumulation(stage, step)):
                loader.batch(step, microbatch)
            continue
        state.guard.restore_losses(())  # no loss is a spike
        results.append((step, train_step(loader, stage, step, 0.0)))
    if not results:
        return []
    values = torch.stack([_values(result) for _, result in results]).tolist()
    return [
        {"step": step + 1, "loss_nats_per_token": loss, "grad_norm": norm, "held_back": held_back > 0}
        for (step, _), (loss, norm, held_back) in zip(results, values, strict=True)
    ]


def _values(result: StepResult) -> Tensor:
    assert result.health is not None, "the batch was not skipped"
    return torch.stack([result.loss.float(), result.grad_norm.float(), result.health[0]])


def _skip_or_stop(state: TrainerState, stage: StagePlan, line: dict[str, Any]) -> None:
    """Skip a bad batch, here and in training, or raise NumericsError."""
    if choose_response(state, stage, line) != "stop":
        skip_from_now_on(state, stage, line, in_warm_up=True)
        return
    step = line["step"] - 1
    state.log.event("stop", stage=stage.name, step=0, why=f"optimizer warm-up: {reason(line)}")
    raise NumericsError(
        f"stage {stage.name}, warm-up of the optimizer state on the batch of step {step} (counted from 0): "
        f"{reason(line)}. {skip_limit_reached(state, stage, line)}The stage has not begun, and no weight has changed. "
        f"Look at the batch with `titan-cpt plan --batch {stage.name} {step}`; to skip such batches set "
        'training.on_nonfinite = "skip"'
    )


def _report(state: TrainerState, passed: str, lines: Sequence[dict[str, Any]], seconds: float) -> None:
    last = "" if not lines else f", loss {lines[-1]['loss_nats_per_token']:.4f}"
    state.display.say(f"  optimizer warm-up: {passed}{last} ({duration(seconds)})")


@torch.no_grad()
def _negative_zeros(model: nn.Module) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """This rank's weights that are -0.0, by tensor: an update at LR 0 adds 0 to every weight, which turns them to 0.0.

    Any other finite weight keeps its bits.
    """
    weights = [local_values(weight) for weight in model.parameters()]
    found = [(weight, torch.nonzero((weight == 0) & torch.signbit(weight), as_tuple=True)) for weight in weights]
    return [(weight, where) for weight, where in found if len(where[0])]
