"""Log training steps and validation losses to metrics.jsonl, and compute forgetting from its baselines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from titan_cpt.distributed.process_group import any_rank_stops
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.state import TrainerState
from titan_cpt.training.validation import ValidationLoss


@dataclass(frozen=True)
class StepResult:
    """Loss, gradient norm and health of one step, as tensors on the device.

    Attributes:
        loss: mean over the global batch in nats per token, 0-dimensional.
        grad_norm: L2 norm before clipping, 0-dimensional.
        health: result of `UpdateGuard.observe`, [2]; None for a skipped batch.
    """

    loss: Tensor
    grad_norm: Tensor
    health: Tensor | None


def record_step(state: TrainerState, stage: StagePlan, step: int, result: StepResult) -> None:
    """Add a step to the metrics log. No host sync."""
    plan = state.plan
    run_step = plan.steps_before(stage) + step + 1
    draws = plan.batch(stage, step) if state.process.rank == 0 else []
    fields = {
        "stage": stage.name,
        "step": step + 1,
        "run_step": run_step,
        "tokens": run_step * plan.step_tokens,
        "replayed_tokens": sum(draw.replayed for draw in draws) * plan.seq_len,
        "lr": state.optimizer.param_groups[0]["lr"],
        "batch_hash": state.reader.batch_hash(draws),
    }
    if result.health is None:
        fields["skipped"] = True
    state.log.step(fields, loss=result.loss, grad_norm=result.grad_norm, tokens=plan.step_tokens, health=result.health)


def validate(state: TrainerState, stage: StagePlan, steps_done: int) -> bool:
    """Measure and log the validation loss of every dataset, and its forgetting.

    Returns:
        False if a signal interrupted the measurement: nothing is logged, and the next session measures again.
    """
    run_step = state.plan.steps_before(stage) + steps_done
    losses = state.validator.measure(state.runner, interrupted=partial(any_rank_stops, state.stop))
    if losses is None:
        return False
    shown = []
    for dataset, loss in losses.items():
        line = validation_line(state, stage, steps_done, dataset, loss)
        state.log.validation(line, run_step)
        forgetting = line["forgetting_nats_per_token"]
        shown.append(f"{dataset} {loss.nats_per_token:.4f}" + ("" if forgetting is None else f" ({forgetting:+.4f})"))
    if shown:
        state.display.say(f"  validation after step {steps_done:,} of {stage.name}: {', '.join(shown)}")
    state.log.restart_clock()
    return True


def validation_line(
    state: TrainerState, stage: StagePlan, steps_done: int, dataset: str, loss: ValidationLoss
) -> dict[str, Any]:
    """The line of metrics.jsonl for a dataset's validation loss; at step 0 the loss becomes a baseline of forgetting.

    Forgetting is None if its baseline is unknown or was measured on other validation data or windows.
    """
    identity = state.validator.identities[dataset]
    if steps_done == 0:
        state.log.baselines[stage.name, dataset] = loss.nats_per_token, identity
    baseline_stage = state.plan.forgetting_since(stage, dataset)
    baseline: float | None = None
    if baseline_stage is not None:
        measured, measured_on = state.log.baselines.get((baseline_stage, dataset), (None, None))
        baseline = measured if measured_on == identity else None
    return {
        "stage": stage.name,
        "step": steps_done,
        "dataset": dataset,
        "loss_nats_per_token": loss.nats_per_token,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
        "forgetting_nats_per_token": None if baseline is None else loss.nats_per_token - baseline,
        "validation_id": identity,
    }
