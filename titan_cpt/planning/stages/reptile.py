"""Reptile: the pull of a stage's weights towards old ones."""

from __future__ import annotations

from typing import Any

from titan_cpt.common.weights.reptile import Reptile
from titan_cpt.config.stages import StageConfig
from titan_cpt.planning.plan_draft import PlanDraft


def reptile_recipe(stage: StageConfig) -> dict[str, Any]:
    """What Reptile adds to a stage's recipe; nothing with step = 1, which leaves the weights as they are."""
    if stage.reptile is None or stage.reptile.step == 1:
        return {}
    return {"reptile.every": stage.reptile.every, "reptile.step": stage.reptile.step}


def reptile_of(draft: PlanDraft, stage: StageConfig, steps: int) -> Reptile | None:
    """The pull of a stage of this number of steps; None without, and a note if that is not what its table suggests."""
    if stage.reptile is None:
        return None
    where = f"stages.{stage.name}.reptile"
    if stage.reptile.step == 1:
        draft.notes.append(f"{where}: with step = 1 no weight is pulled; write step = 0.1 (arXiv:2508.01908)")
        return None
    if stage.reptile.every > steps:
        draft.notes.append(
            f"{where}: every = {stage.reptile.every:,} is more than the stage's {steps:,} steps, so that no weight is "
            "pulled"
        )  # the old weights are kept: an annealing branch may be longer than the stage, and pull
    return Reptile(stage.reptile.every, stage.reptile.step, on_host=stage.reptile.keep_on == "host")
