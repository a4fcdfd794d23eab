"""The RoPE of a stage's weights: that of its initial weights, changed by the keys of the stage's `rope`.

A stage changes it for context extension: a larger base (adjusted base frequency: Xiong et al. 2023, arXiv:2309.16039,
section 2.1), YaRN (Peng et al. 2023, arXiv:2309.00071), or Llama 3's scaling (Grattafiori et al. 2024,
arXiv:2407.21783, section 3.4.2).
"""

from __future__ import annotations

from typing import Any

from titan_cpt.config.model import StageRopeConfig
from titan_cpt.config.stages import StageConfig
from titan_cpt.errors import ConfigError
from titan_cpt.models.spec import ROPE_SCALINGS, ModelSpec, Rope, RopeScaling
from titan_cpt.planning.plan import StageCheckpoint
from titan_cpt.planning.plan_draft import PlanDraft


def stage_spec(draft: PlanDraft, stage: StageConfig, init: StageCheckpoint | str) -> ModelSpec:
    """The model of a stage: that of its initial weights, with the keys of the stage's `rope`.

    Weights from outside of the run must have the RoPE of [model], except for keys that the stage sets; that is checked
    when they are loaded.
    """
    spec = draft.stages[init.stage].spec if isinstance(init, StageCheckpoint) else draft.spec
    if stage.rope is None:
        return spec
    try:
        return spec.with_rope(_changed(spec.rope, stage.rope))
    except ConfigError as error:
        where = f"stages.{stage.name}.rope"
        draft.problems += [line.replace("model.rope_scaling", where) for line in str(error).splitlines()]
        return spec


def rope_recipe(stage: StageConfig, spec: ModelSpec) -> dict[str, Any]:
    """The part of the stage's recipe about RoPE: the keys that it sets, with the defaults of the scaling's numbers."""
    if stage.rope is None:
        return {}
    recipe: dict[str, Any] = {} if stage.rope.base is None else {"rope.base": spec.rope_base}
    if stage.rope.kind is not None:
        recipe["rope.kind"] = stage.rope.kind
        if spec.rope_scaling is not None:
            names = ("factor", "original_seq_len", *ROPE_SCALINGS[spec.rope_scaling.kind])
            numbers = {f"rope.{name}": getattr(spec.rope_scaling, name) for name in names}
            recipe |= {name: number for name, number in numbers.items() if number is not None}
    return recipe


def _changed(rope: Rope, keys: StageRopeConfig) -> Rope:
    base = rope.base if keys.base is None else keys.base
    if keys.kind is None:
        return Rope(base, rope.scaling)
    if keys.kind == "none":
        return Rope(base)
    return Rope(base, RopeScaling(**keys.model_dump(exclude={"base"}, exclude_none=True)))
