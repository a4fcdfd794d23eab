"""From a config, a world size and the token counts of its files to the training plan. Pure; reads no file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

from titan_cpt.config.schema import Config
from titan_cpt.config.stages import StageConfig
from titan_cpt.data.inventory import DataInventory
from titan_cpt.data.mixture import leaf_counts
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.errors import PlanError
from titan_cpt.models.registry import has_family_module
from titan_cpt.planning import lr_schedules
from titan_cpt.planning.input_notes import input_notes
from titan_cpt.planning.memory import Footprint, footprint
from titan_cpt.planning.model_spec import model_spec
from titan_cpt.planning.parallel import memory_inputs, parallel_dims_of
from titan_cpt.planning.parallel_rules import parallel_problems
from titan_cpt.planning.plan import Plan, StagePlan
from titan_cpt.planning.plan_draft import PlanDraft
from titan_cpt.planning.plan_recipe import base_recipe, lr_recipe, stage_recipe
from titan_cpt.planning.stages.averaging import average_recipe, averaging_of, check_average
from titan_cpt.planning.stages.data_budget import (
    count_sequences,
    dataset_use,
    other_order_notes,
    stage_steps,
    stored_order_notes,
)
from titan_cpt.planning.stages.documents import (
    attended_spans,
    document_mask_of,
    document_notes,
    document_positions_of,
)
from titan_cpt.planning.stages.initial_weights import history_of, initial_weights
from titan_cpt.planning.stages.lr_span import LRSpan, StageLength, lr_spans
from titan_cpt.planning.stages.mixture import mixture_tree, new_data_leaves, stage_weights
from titan_cpt.planning.stages.new_rows import new_rows_of, new_rows_recipe
from titan_cpt.planning.stages.notes import stage_notes
from titan_cpt.planning.stages.optimizers import (
    optimizer_hyperparameters,
    optimizer_notes,
    optimizer_problems,
    unused_muon_keys,
)
from titan_cpt.planning.stages.own_batch import (
    batch_problems,
    batch_sizes_of,
    local_batch_size_of,
    ramp_notes,
    seq_len_of,
    with_own_batch,
)
from titan_cpt.planning.stages.partition import partition_notes, partition_of, partition_recipe
from titan_cpt.planning.stages.replay import check_replay_lasts, replay_leaves
from titan_cpt.planning.stages.reptile import reptile_of
from titan_cpt.planning.stages.rope import rope_recipe, stage_spec
from titan_cpt.planning.stages.schedule import end_points, final_window, pre_anneal_step, schedule_of
from titan_cpt.planning.stages.warm_up import warm_up_passes


def make_plan(config: Config, inventory: DataInventory, world_size: int = 1, *, gpu_bytes: int | None = None) -> Plan:
    """The plan of the config on `world_size` ranks.

    Args:
        gpu_bytes: memory of each GPU, on which the loss's share of the estimated memory depends; None: of a CPU.

    Raises:
        ConfigError: the model cannot be built.
        PlanError: the config contradicts itself, the data or the number of ranks; the message lists all problems.
    """
    spec = model_spec(config, inventory.vocab_size or 1)
    draft = PlanDraft(config, inventory, spec)
    draft.problems += [*parallel_problems(config, spec, world_size), *_plugin_problems(config)]
    draft.problems += unused_muon_keys(config)
    draft.notes += input_notes(config, inventory, spec)
    dims = ParallelDims() if draft.problems else parallel_dims_of(config, world_size)
    draft.problems += batch_problems(config, dims)
    draft.sequences = count_sequences(config, inventory, draft.problems)
    draft.spans = lr_spans(config.stages, [_length(config, stage) for stage in config.stages])
    for stage in config.stages:
        plan = _plan_stage(draft, stage)
        draft.stages[stage.name] = plan
        draft.notes += [*stored_order_notes(plan, inventory.sequences), *other_order_notes(draft, plan)]
        draft.notes += ramp_notes(plan, stage)
        draft.notes += document_notes(plan, inventory)
        draft.problems += optimizer_problems(draft, plan)
    if draft.problems:
        raise PlanError(_message(config.job.name, draft.problems))
    stages = tuple(draft.stages.values())
    draft.notes += [*stage_notes(stages), *optimizer_notes(stages), *partition_notes(stages)]
    stage_dims = {stage.name: parallel_dims_of(with_own_batch(config, stage), world_size) for stage in config.stages}
    costs = _footprints(draft, stage_dims, gpu_bytes=gpu_bytes)
    return Plan(
        name=config.job.name,
        spec=spec,
        stages=stages,
        seed=config.job.seed,
        seq_len=config.training.seq_len,
        global_batch_size=config.training.global_batch_size,
        local_batch_size=config.training.local_batch_size,
        parallel_dims=dims,
        data_parallel=dims.data_parallel,
        stage_dims=stage_dims,
        footprints=costs,
        sequences=draft.sequences,
        base_recipe=base_recipe(config, spec),
        notes=tuple(draft.notes),
        packing=inventory.packing,
    )


def _plugin_problems(config: Config) -> Iterator[str]:
    """Parallelism that a family or a metric of another package does not support."""
    degrees = config.parallelism
    if degrees.tensor_parallel_degree > 1 and not has_family_module(config.model.family, "parallelize"):
        yield (
            f"parallelism.tensor_parallel_degree: the package of model.family = {config.model.family!r} has no module "
            "parallelize with its tensor-parallel plan: set the degree to 1, or add the module"
        )
    for degree in ("pipeline_parallel_degree", "context_parallel_degree"):
        if config.validation.metrics and getattr(degrees, degree) > 1:
            yield f"validation.metrics: not supported with parallelism.{degree} > 1: remove them, or set it to 1"


def _footprints(
    draft: PlanDraft, stage_dims: Mapping[str, ParallelDims], *, gpu_bytes: int | None
) -> dict[str, Footprint]:
    """Memory and communication of a rank in each stage, in the largest of its batch sizes."""
    inputs = {}
    for stage in draft.config.stages:
        plan, dims = draft.stages[stage.name], stage_dims[stage.name]
        largest = max(phase.size for phase in plan.batch_sizes.within(plan.steps))
        accumulation = largest // (dims.data_parallel * plan.local_batch_size)
        own = with_own_batch(draft.config, stage)
        inputs[stage.name] = replace(
            memory_inputs(own, dims, accumulation, gpu_bytes=gpu_bytes),
            muon=plan.optimizer.muon is not None,
            copies_beside=plan.weight_copies(on_host=False),
            copies_on_host=plan.weight_copies(on_host=True),
            partition=plan.partition,
        )
    # Gradients have one dtype in the whole run: float32 if any step accumulates them.
    gradient_bytes = max(each.gradient_bytes for each in inputs.values())
    return {
        name: footprint(draft.stages[name].spec, stage_dims[name], replace(each, gradient_bytes=gradient_bytes))
        for name, each in inputs.items()
    }


def _plan_stage(draft: PlanDraft, stage: StageConfig) -> StagePlan:
    config = draft.config
    span = draft.spans[stage.name]
    length = span.lengths[span.names.index(stage.name)]
    steps, seq_len, batch_sizes = length.steps, length.seq_len, length.batch_sizes
    points = end_points(span)
    schedule = _schedule(draft, stage, span, points)
    init = initial_weights(draft, stage)
    check_average(draft, stage, init)
    anneals_at = pre_anneal_step(span, points, stage)
    spec = stage_spec(draft, stage, init)
    history = history_of(draft, init)
    weights = stage_weights(draft, stage, batch_sizes.sequences_before(steps))
    new = new_data_leaves(draft, stage, history, weights)
    tree, shares = mixture_tree(stage, new, replay_leaves(draft, stage, history, init))
    counts = leaf_counts(tree, batch_sizes.sequences_before(steps))
    masked = document_mask_of(config, stage)
    partition = partition_of(draft, stage)
    window = config.validation.final_window_steps, config.validation.final_window_every
    plan = StagePlan(
        name=stage.name,
        steps=steps,
        datasets=tuple(stage.dataset),
        schedule=schedule,
        init=init,
        keep_optimizer=stage.optimizer_state == "keep",
        optimizer=optimizer_hyperparameters(config, stage),
        pre_anneal_step=anneals_at,
        history=history,
        tree=tree,
        shares=shares,
        use_by_dataset=dataset_use(draft, counts, seq_len=seq_len, by_source=False),
        use_by_source=dataset_use(draft, counts, seq_len=seq_len, by_source=True),
        final_window=final_window(steps, *window),
        recipe=stage_recipe(config, stage, steps, init, lr_recipe(stage, span, schedule, points), weights)
        | rope_recipe(stage, spec)
        | average_recipe(draft, init)
        | partition_recipe(draft, stage, partition)
        | new_rows_recipe(stage),
        spec=spec,
        seq_len=seq_len,
        batch_sizes=batch_sizes,
        local_batch_size=local_batch_size_of(config, stage),
        document_mask=masked,
        document_positions=document_positions_of(config, stage),
        attended_spans=attended_spans(draft.inventory, draft.spec, tree, seq_len) if masked else None,
        averaging=averaging_of(draft, stage, length, anneals_at=anneals_at),
        schedule_offset=span.steps_before(stage.name),
        warm_up_passes=warm_up_passes(draft, stage, steps),
        reptile=reptile_of(draft, stage, steps),
        partition=partition,
        new_rows=new_rows_of(draft, stage, init),
    )
    if stage.replay is not None:
        check_replay_lasts(draft, plan, stage.replay)
    return plan


def _length(config: Config, stage: StageConfig) -> StageLength:
    seq_len = seq_len_of(config, stage)
    batch_sizes = batch_sizes_of(config, stage)
    return StageLength(stage.name, stage_steps(stage, batch_sizes, seq_len=seq_len), seq_len, batch_sizes)


def _schedule(
    draft: PlanDraft, stage: StageConfig, span: LRSpan, points: Mapping[str, Fraction]
) -> lr_schedules.Schedule:
    """The stage's schedule; its faults are reported once, at the first stage that it spans."""
    try:
        return schedule_of(span, points)
    except ValueError as error:
        if stage.name == span.first.name:
            spanned = f" (it spans {', '.join(span.names)}: {span.steps:,} steps)" if len(span.names) > 1 else ""
            draft.problems.append(f"stages.{stage.name}.lr: {error}{spanned}")
        return lr_schedules.constant_schedule(warmup_until=0, end=span.steps, peak=1.0)


def _message(name: str, problems: list[str]) -> str:
    title = f"{len(problems)} problem{'s' * (len(problems) > 1)} in the plan of {name!r}:"
    return "\n".join([title, *(f"  - {problem}" for problem in problems)])
