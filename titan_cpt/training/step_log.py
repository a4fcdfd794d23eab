"""Log training steps to metrics.jsonl."""

from __future__ import annotations

from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.forward_backward import StepResult
from titan_cpt.training.metrics import SumsBySource
from titan_cpt.training.state import TrainerState


def record_step(state: TrainerState, stage: StagePlan, step: int, result: StepResult) -> None:
    """Add a step to the metrics log. No host sync."""
    plan = state.plan
    run_step = plan.steps_before(stage) + step + 1
    draws = plan.batch(stage, step) if state.process.rank == 0 else []
    fields = {
        "stage": stage.name,
        "step": step + 1,
        "run_step": run_step,
        "tokens": plan.tokens_before(stage) + stage.tokens_before(step + 1),
        "replayed_tokens": sum(draw.replayed for draw in draws) * stage.seq_len,
        "lr": stage.lr_at(step),
        **_lr_by_group(stage, step),
        "batch_hash": state.readers[stage.name].batch_hash(draws),
    }
    if result.health is None:
        fields["skipped"] = True
    sums = None if result.sums_S2 is None else SumsBySource(result.sums_S2, tuple(stage.source_numbers))
    state.log.step(
        fields,
        loss=result.loss,
        grad_norm=result.grad_norm,
        tokens=stage.step_tokens(step),
        flops_per_token=stage.flops_per_token,
        health=result.health,
        by_source=sums,
    )


def _lr_by_group(stage: StagePlan, step: int) -> dict[str, dict[str, float]]:
    """The learning rate of every pattern of lr_scale that some trained weight follows."""
    if stage.partition is None or not stage.partition.scales:
        return {}
    lr = stage.lr_at(step)
    return {"lr_by_group": {pattern: lr * scale for pattern, scale in stage.partition.scales.items()}}
