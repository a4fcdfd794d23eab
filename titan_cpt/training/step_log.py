"""Logging a step and a validation: lines of metrics.jsonl, and the baselines from which forgetting is computed."""

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
    """The numbers of one step, still on the device.

    Attributes:
        loss: mean over the global batch, nats per token; no dimensions.
        grad_norm: L2 norm before clipping; no dimensions.
        health: what `UpdateGuard.observe` returned; None for a skipped batch.
    """

    loss: Tensor
    grad_norm: Tensor
    health: Tensor | None


def record_step(state: TrainerState, stage: StagePlan, step: int, result: StepResult) -> None:
    """Add a step to the metrics log. No host sync."""
    plan = state.plan
    run_step = plan.steps_before(stage) + step + 1
    draws = plan.batch(stage, step) if state.process.rank == 0 else []
    numbers = {
        "stage": stage.name,
        "step": step + 1,
        "run_step": run_step,
        "tokens": run_step * plan.step_tokens,
        "replayed_tokens": sum(draw.replayed for draw in draws) * plan.seq_len,
        "lr": state.optimizer.param_groups[0]["lr"],
        "batch_hash": state.reader.batch_hash(draws),
    }
    if result.health is None:
        numbers["skipped"] = True
    state.log.step(numbers, loss=result.loss, grad_norm=result.grad_norm, tokens=plan.step_tokens, health=result.health)


def validate(state: TrainerState, stage: StagePlan, steps_done: int) -> bool:
    """Measure and log the validation loss of every dataset, and its forgetting.

    Returns:
        False if a signal interrupted it: then nothing is logged, and the measurement is still due.
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

    Forgetting is None where the baseline is unknown, or was measured on other data or windows.
    """
    since, identity = state.plan.forgetting_since(stage, dataset), state.validator.identities[dataset]
    if steps_done == 0:
        state.log.before[stage.name, dataset] = loss.nats_per_token, identity
    before, measured_on = (None, None) if since is None else state.log.before.get((since, dataset), (None, None))
    comparable = before is not None and measured_on == identity
    return {
        "stage": stage.name,
        "step": steps_done,
        "dataset": dataset,
        "loss_nats_per_token": loss.nats_per_token,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
        "forgetting_nats_per_token": loss.nats_per_token - before if comparable and before is not None else None,
        "validation_id": identity,
    }
