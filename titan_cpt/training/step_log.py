"""Log training steps to metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.state import TrainerState


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
