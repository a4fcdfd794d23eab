"""plan.json: the plan as other programs read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from titan_cpt.errors import PlanError
from titan_cpt.planning.lr_schedules import lr_at
from titan_cpt.planning.parallel_text import parallel_as_json
from titan_cpt.planning.plan import Plan, StagePlan


def plan_as_json(plan: Plan, device_bytes: int | None = None) -> dict[str, Any]:
    """The plan as DESIGN section 3b promises it to other programs."""
    stages = [stage_as_json(plan, stage, index) for index, stage in enumerate(plan.stages)]
    total = sum(stage["tokens"] for stage in stages)
    return {
        "name": plan.name,
        "fingerprint": plan.fingerprint,
        "world_size": plan.world_size,
        "accumulation": plan.gradient_accumulation_steps,
        "step_tokens": plan.step_tokens,
        "layout": parallel_as_json(plan, device_bytes),
        "model": {
            "family": plan.spec.family,
            "parameters": plan.spec.parameters,
            "parameters_without_embeddings": plan.spec.parameters_without_embeddings,
            "vocab_size": plan.spec.vocab_size,
        },
        "stages": stages,
        "total_tokens": total,
        "retraining_tokens": total,
        "notes": list(plan.notes),
    }


def stage_as_json(plan: Plan, stage: StagePlan, index: int) -> dict[str, Any]:
    """One entry of `stages`: steps, tokens, data, learning rates and where the stage's weights come from."""
    tokens = stage.steps * plan.step_tokens
    lrs = [stage.lr_at(step) for step in _turning_steps(stage)]
    use = {name: vars(use) for name, use in stage.use_by_dataset.items()}
    domains = {name: vars(use) for name, use in stage.use_by_source.items() if "." in name}
    return {
        "name": stage.name,
        "steps": stage.steps,
        "tokens": tokens,
        "start_lr": stage.lr_at(0),
        "peak_lr": max(lrs),
        "final_lr": stage.lr_at(stage.steps - 1),
        "flops": plan.spec.flops_per_token(plan.seq_len) * tokens,
        "init": stage.init if isinstance(stage.init, str) else vars(stage.init),
        "pre_anneal_step": stage.pre_anneal_step,
        "union_tokens": sum(s.steps for s in plan.stages[: index + 1]) * plan.step_tokens,
        "final_window": list(stage.final_window),
        "new_datasets": list(stage.datasets),
        "datasets": use,
        "domains": domains,
    }


def _turning_steps(stage: StagePlan) -> list[int]:
    """Steps among which the stage's highest LR is found: its ends, and both sides of every phase's border."""
    borders = {math.floor(phase.end) + side for phase in stage.schedule for side in (-1, 0)}
    return sorted({0, stage.steps - 1} | {step for step in borders if 0 <= step < stage.steps})


def lr_as_json(plan: Plan, steps: Sequence[int]) -> dict[str, dict[str, float]]:
    """{stage: {"t": LR}} for t as METHOD counts it: the first step of a stage is t = 1, past the end the LR stays."""
    return {stage.name: {str(t): lr_at(stage.schedule, t) for t in steps} for stage in plan.stages}


def batch_as_json(plan: Plan, stage: str, step: str) -> list[tuple[str, int]]:
    """[[source, ordinal], ...] of one global batch, in batch order.

    Raises:
        PlanError: there is no such stage or step.
    """
    if not step.isdecimal():
        raise PlanError(f"--batch: the 0-based step must be an integer, got {step!r}")
    return [(draw.source, draw.ordinal) for draw in plan.batch(plan.stage(stage), int(step))]
