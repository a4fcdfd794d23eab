"""The plan as JSON, for plan.json and `titan-cpt plan --json`. The keys are a public interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from titan_cpt.common.weights.partition import Partition
from titan_cpt.data.mixture import Draw
from titan_cpt.errors import PlanError
from titan_cpt.planning.lr_schedules import lr_at
from titan_cpt.planning.memory import Footprint, fits
from titan_cpt.planning.parallel import PipelineRankContents, pipeline_rank_contents
from titan_cpt.planning.plan import Plan, StagePlan


def plan_as_json(plan: Plan, device_bytes: int | None = None) -> dict[str, Any]:
    """The whole plan.

    Args:
        device_bytes: memory of a device; `fits` is null without it.
    """
    stages = [stage_as_json(plan, stage) for stage in plan.stages]
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
        "packing": [
            {"source": source, "seq_len": seq_len, **vars(counts), "fill": counts.fill(seq_len)}
            for (source, seq_len), counts in plan.packing.items()
        ],
        "notes": list(plan.notes),
    }


def stage_as_json(plan: Plan, stage: StagePlan) -> dict[str, Any]:
    """One entry of `stages`: steps, tokens, batch, data, learning rates and initial weights."""
    datasets = {name: vars(use) for name, use in stage.use_by_dataset.items()}
    domains = {name: vars(use) for name, use in stage.use_by_source.items() if "." in name}
    return {
        "name": stage.name,
        "steps": stage.steps,
        "tokens": stage.tokens,
        "seq_len": stage.seq_len,
        "batch_sizes": [[phase.first_step, phase.size] for phase in stage.batch_sizes.within(stage.steps)],
        "local_batch_size": stage.local_batch_size,
        "document_mask": stage.document_mask,
        "document_positions": stage.document_positions,
        "attended_span": stage.attended_span,
        "rope": stage.spec.rope.as_record(),
        "start_lr": stage.lr_at(0),
        "peak_lr": stage.peak_lr,
        "final_lr": stage.final_lr,
        "flops": stage.flops_per_token * stage.tokens,
        "flops_per_token": stage.flops_per_token,
        "init": stage.init if isinstance(stage.init, str) else vars(stage.init),
        "optimizer": stage.optimizer.name,
        "optimizer_state": _optimizer_state(stage),
        "warm_up_flops": stage.warm_up_flops,
        "reptile": stage.reptile and {**vars(stage.reptile), "pulls": stage.steps // stage.reptile.every},
        "partition": stage.partition and partition_as_json(stage.partition),
        "new_rows": _new_rows(stage),
        "averaging": stage.averaging and {**stage.averaging.settings, "on_host": stage.averaging.on_host},
        "lr_continues": plan.schedule_span(stage)[0].name if stage.schedule_offset else None,
        "pre_anneal_step": stage.pre_anneal_step,
        "union_tokens": plan.tokens_before(stage) + stage.tokens,
        "final_window": list(stage.final_window),
        "new_datasets": list(stage.datasets),
        "datasets": datasets,
        "domains": domains,
    }


def partition_as_json(partition: Partition) -> dict[str, Any]:
    """What a stage trains: numbers, and the trained rows of every weight with their factor of the LR, if any."""
    return {
        "weights": sum(1 for parts in partition.parts.values() if parts),
        "parameters": partition.parameters,
        "parts": {
            name: [{"rows": part.rows or [0, partition.sizes[name][0]], "lr_scale": part.scale} for part in parts]
            for name, parts in partition.parts.items()
        },
    }


def _new_rows(stage: StagePlan) -> dict[str, Any] | None:
    new = stage.new_rows
    if new is None:
        return None
    return {**vars(new), "rows": new.end - new.first, "padding_rows": stage.spec.vocab_size - new.end}


def _optimizer_state(stage: StagePlan) -> str:
    if stage.warm_up_passes:
        return f"warm:{stage.warm_up_passes}"
    return "keep" if stage.keep_optimizer else "reset"


def parallel_as_json(plan: Plan, device_bytes: int | None = None) -> dict[str, Any]:
    """The entry `layout`: parallelism degrees, layers of each pipeline rank, memory and communication.

    The numbers are those of the stage that needs the most memory; `stages` has some of every stage.
    """
    dims = plan.parallel_dims
    costs = plan.footprint
    stages = {stage.name: _costs_as_json(plan, stage, device_bytes) for stage in plan.stages}
    return {
        **{name: getattr(dims, name) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp")},
        "schedule": dims.schedule if dims.pp > 1 else None,
        "microbatches": dims.microbatches,
        "accumulation": plan.gradient_accumulation_steps,
        "bubble": costs.bubble,
        "pipeline_ranks": [_contents_as_json(held) for held in pipeline_rank_contents(dims, plan.spec.layers)],
        "local_parameters": list(costs.local_parameters),
        "bytes_per_rank": {
            **memory_parts(costs),
            "never_at_once": costs.overlap_bytes,
            "total": costs.memory,
            "of_pipeline_rank": costs.pipeline_rank,
            "in_host_memory": max(each.host for each in plan.footprints.values()),
        },
        "bytes_sent_per_step": {**traffic_parts(costs), "total": costs.traffic.total},
        "fits": None if device_bytes is None else fits(costs, device_bytes),
        "stages": stages,
    }


def lr_as_json(plan: Plan, steps: Sequence[int]) -> dict[str, dict[str, float]]:
    """{stage: {"t": LR}}; the first step of a stage is t = 1, and after the stage's end the LR stays."""
    return {
        stage.name: {str(t): lr_at(stage.schedule, stage.schedule_offset + min(t, stage.steps)) for t in steps}
        for stage in plan.stages
    }


def batch_as_json(plan: Plan, stage: str, step: str) -> list[tuple[Any, ...]]:
    """[[source, ordinal], ...] of one global batch, in batch order.

    A replayed sequence that is made up of parts of trained ones has a third entry, [[seq_len, ordinal, start, stop],
    ...]: tokens [start, stop) of the sequences of that length; the second entry is then the ordinal of the first part.

    Args:
        step: 0-based, as it was written on the command line.

    Raises:
        PlanError: no such stage or step.
    """
    if not step.isdecimal():
        raise PlanError(f"--batch: the 0-based step must be an integer, got {step!r}")
    try:
        return [_draw_as_json(draw) for draw in plan.batch(plan.stage(stage), int(step))]
    except PlanError as error:
        raise PlanError(f"--batch: {error}") from None


def _draw_as_json(draw: Draw) -> tuple[Any, ...]:
    return (draw.source, draw.ordinal, *([[[*part] for part in draw.parts]] if draw.parts else []))


def memory_parts(costs: Footprint) -> dict[str, int]:
    """Bytes of device memory, by what they hold."""
    names = ("parameters", "gradients", "optimizer", "gathered", "activations", "logits", "working")
    optional = [name for name in ("orthogonalization", "weight_copies") if getattr(costs, name)]
    return {name: getattr(costs, name) for name in (*names, *optional)}


def traffic_parts(costs: Footprint) -> dict[str, int]:
    """Bytes that a rank sends in a step, by parallelism technique."""
    with_muon = {"optimizer": costs.traffic.optimizer} if costs.traffic.optimizer else {}
    return {**{name: getattr(costs.traffic, name) for name in ("fsdp", "tensor", "context", "pipeline")}, **with_muon}


def _costs_as_json(plan: Plan, stage: StagePlan, device_bytes: int | None) -> dict[str, Any]:
    """Gradient accumulation of every batch size of a stage, its memory and its communication."""
    costs = plan.footprints[stage.name]
    return {
        "accumulation": [plan.accumulation(stage, phase.first_step) for phase in stage.batch_sizes.within(stage.steps)],
        "microbatches": plan.stage_dims[stage.name].microbatches,
        "bytes_per_rank": costs.memory,
        "bytes_in_host_memory": costs.host,
        "bytes_sent_per_step": costs.traffic.total,
        "fits": None if device_bytes is None else fits(costs, device_bytes),
    }


def _contents_as_json(contents: PipelineRankContents) -> dict[str, Any]:
    return {
        "pipeline_rank": contents.pipeline_rank,
        "first_rank": contents.ranks[0],
        "last_rank": contents.ranks[-1],
        "holds": contents.parts,
    }
