"""What each stage trains, and with which factor of its learning rate: `trainable` and `lr_scale`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from titan_cpt.common.weights.partition import (
    FIRST_NEW_ROW,
    LR_SCALE,
    TRAINABLE,
    Partition,
    make_partition,
    partition_problems,
    trained_alike,
)
from titan_cpt.common.weights.patterns import NEW_ROWS, short_list
from titan_cpt.config.schema import Config
from titan_cpt.config.stages import StageConfig
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.plan import StageCheckpoint, StagePlan
from titan_cpt.planning.plan_draft import PlanDraft
from titan_cpt.planning.sharding import stage_parameters


def weight_sizes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the model, by name."""
    return {name: size for name, size, _ in stage_parameters(spec, ParallelDims(), 0)}


def partition_of(draft: PlanDraft, stage: StageConfig) -> Partition | None:
    """What a stage trains; None if it trains all weights alike. Patterns without effect are problems."""
    if stage.trainable is None and stage.lr_scale is None:
        return None
    sizes = weight_sizes(draft.spec)
    first_new_row = draft.inventory.base_vocab_size
    where = f"stages.{stage.name}"
    problems = [
        f"{where}.{problem}"
        for problem in partition_problems(
            sizes,
            trainable=stage.trainable,
            lr_scale=stage.lr_scale,
            first_new_row=first_new_row,
            tied=draft.spec.tied,
        )
    ]
    draft.problems += problems
    if problems:
        return None
    partition = make_partition(sizes, trainable=stage.trainable, lr_scale=stage.lr_scale, first_new_row=first_new_row)
    if partition.is_trivial:
        return None
    draft.problems += _with_other_kernels(draft.config, stage)
    return partition


def partition_recipe(draft: PlanDraft, stage: StageConfig, partition: Partition | None) -> dict[str, Any]:
    """What `trainable` and `lr_scale` add to a stage's recipe; nothing where all weights are trained alike."""
    if partition is None:
        return {}
    recipe: dict[str, Any] = {}
    if stage.trainable is not None:
        recipe[TRAINABLE] = sorted({*stage.trainable})
    if stage.lr_scale is not None:
        recipe[LR_SCALE] = {pattern: float(scale) for pattern, scale in sorted(stage.lr_scale.items())}
    if any(pattern in NEW_ROWS for pattern in (*(stage.trainable or ()), *(stage.lr_scale or {}))):
        recipe[FIRST_NEW_ROW] = draft.inventory.base_vocab_size
    return recipe


def _with_other_kernels(config: Config, stage: StageConfig) -> Iterator[str]:
    """The message for settings of which the weights that the optimizer updates cannot change."""
    found = ['optimizer.implementation = "triton"'] if config.optimizer.implementation == "triton" else []
    found += ["training.cuda_graphs"] if config.training.cuda_graphs else []
    if found:
        key = TRAINABLE if stage.trainable is not None else LR_SCALE
        yield f"stages.{stage.name}.{key}: is not supported together with {' and '.join(found)}: remove one of the two"


def partition_notes(stages: Sequence[StagePlan]) -> Iterator[str]:
    """A note for each stage that keeps the optimizer state of a stage that trained other rows."""
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        if stage.keep_optimizer and isinstance(stage.init, StageCheckpoint):
            earlier = by_name[stage.init.stage]
            note = new_state_note(stage, earlier.partition, of=f"stage {earlier.name!r}")
            if note is not None:
                yield note


def new_state_note(stage: StagePlan, earlier: Partition | None, *, of: str) -> str | None:
    """The note on weights whose optimizer state begins anew although it is kept; None without such weights."""
    anew = weights_with_new_state(stage, earlier)
    if not anew:
        return None
    return (
        f"stages.{stage.name}.optimizer_state: the state of {short_list(anew)} begins anew, as {of} did not train "
        "these in the same rows"
    )


def weights_with_new_state(stage: StagePlan, earlier: Partition | None) -> list[str]:
    """Trained weights whose optimizer state an earlier stage does not have: it did not train them in the same rows."""
    partition = stage.partition
    return [
        name
        for name in weight_sizes(stage.spec)
        if not trained_alike(name, partition, earlier) and (partition is None or partition.parts[name])
    ]
