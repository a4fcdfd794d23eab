"""Passes at LR 0 that warm up a stage's optimizer state: `optimizer_state = "warm:N"`."""

from __future__ import annotations

from titan_cpt.config.stages import StageConfig
from titan_cpt.planning.plan_draft import PlanDraft


def warm_up_passes(draft: PlanDraft, stage: StageConfig, steps: int) -> int:
    """The number of passes, of which each has the batch of one of the stage's `steps` steps; 0 without a warm-up."""
    if stage.warm_up_passes > steps:
        draft.problems.append(
            f"stages.{stage.name}.optimizer_state: {stage.optimizer_state!r} needs the batches of "
            f"{stage.warm_up_passes:,} steps, and the stage has {steps:,}: write at most 'warm:{steps}'"
        )
        return 0
    return stage.warm_up_passes
