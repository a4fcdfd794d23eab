"""Parallelism degrees, memory and communication of a plan as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from titan_cpt.planning.memory import RESERVE, fits
from titan_cpt.planning.parallel import pipeline_rank_contents
from titan_cpt.planning.plan import Plan, StagePlan
from titan_cpt.planning.plan_json import memory_parts, traffic_parts


def parallel_lines(plan: Plan, device_bytes: int | None = None) -> Iterator[str]:
    """Degrees, layers of each pipeline rank, estimated memory and communication.

    Args:
        device_bytes: memory of a device; with it the last line says whether the plan fits.
    """
    largest = max(plan.footprints, key=lambda name: plan.footprints[name].memory)
    yield from _degree_lines(plan, plan.stage(largest))
    costs = plan.footprints[largest]
    of_stage = f" in stage {largest!r}" if len({*plan.footprints.values()}) > 1 else ""
    unit = _unit(costs.memory)
    parts = ", ".join(f"{name} {_in(unit, size)}" for name, size in memory_parts(costs).items() if size)
    if costs.overlap_bytes:
        overlap = f"{_in(unit, costs.overlap_bytes)} {unit}"
        parts += f"; {overlap} less than their sum, as not all are in memory at the same time"
    yield f"estimated memory per rank{of_stage}: {_in(unit, costs.memory)} {unit} ({parts})"
    in_host = max(plan.footprints.values(), key=lambda each: each.host)
    if in_host.host:
        held = ["parameters, gradients, optimizer"] * (in_host.host > in_host.host_copies)
        held += ["copies of the weights"] * (in_host.host_copies > 0)
        yield f"host memory per rank: {_with_unit(in_host.host)} ({', '.join(held)})"
    if costs.traffic.total:
        unit = _unit(costs.traffic.total)
        parts = ", ".join(f"{name} {_in(unit, size)}" for name, size in traffic_parts(costs).items() if size)
        yield f"sent per rank and step: {_in(unit, costs.traffic.total)} {unit} ({parts})"
    if device_bytes is not None:
        share = costs.memory / device_bytes
        verdict = "fits" if fits(costs, device_bytes) else "does NOT fit"
        reserve = f"{RESERVE:.0%} is reserved for what is not estimated"
        yield f"{verdict}: {share:.0%} of {_with_unit(device_bytes)}; {reserve}"


def _degree_lines(plan: Plan, stage: StagePlan) -> Iterator[str]:
    """Degrees, and the pipeline of the stage that needs the most memory."""
    dims = plan.stage_dims[stage.name]
    if dims.world_size > 1:
        yield (
            f"parallelism: pp {dims.pp} x dp_replicate {dims.dp_replicate} x dp_shard {dims.dp_shard} x "
            f"cp {dims.cp} x tp {dims.tp} = {dims.world_size:,} ranks; tensor-parallel ranks are adjacent"
        )
    if dims.pp > 1:
        yield (
            f"pipeline: {dims.schedule}, {dims.pipeline_stages} pipeline stages, {dims.microbatches} micro-batches of "
            f"{stage.local_batch_size // dims.microbatches}; bubble {plan.footprint.bubble:.1%} of the time"
        )
        for held in pipeline_rank_contents(dims, plan.spec.layers):
            yield (
                f"  pipeline rank {held.pipeline_rank}: ranks {held.ranks[0]:,} to {held.ranks[-1]:,} hold "
                f"{', '.join(held.parts)}"
            )


def _unit(size: int) -> str:
    """GiB, or for debug models MiB."""
    return "GiB" if size >= 0.1 * 2**30 else "MiB"


def _in(unit: str, size: int) -> str:
    return f"{size / 2**30:.2f}" if unit == "GiB" else f"{size / 2**20:.2f}"


def _with_unit(size: int) -> str:
    return f"{_in(_unit(size), size)} {_unit(size)}"
