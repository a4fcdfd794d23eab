"""How a layout and its costs are shown: JSON for other programs, lines for people; and whether it fits a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.planning.memory import RESERVE, Footprint, fits
from titan_cpt.planning.plan import Plan


def parallel_as_json(plan: Plan, device_bytes: int | None = None) -> dict[str, Any]:
    """Degrees, who holds what, and the costs; `fits` is null where no device was named."""
    layout, costs = plan.parallel_dims, plan.footprint
    return {
        **{name: getattr(layout, name) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp")},
        "schedule": layout.schedule if layout.pp > 1 else None,
        "microbatches": layout.microbatches,
        "accumulation": plan.gradient_accumulation_steps,
        "bubble": costs.bubble,
        "pipeline_ranks": [vars_of(held) for held in holdings(layout, plan.spec.layers)],
        "local_parameters": list(costs.local_parameters),
        "bytes_per_rank": {
            **_memory(costs),
            "never_at_once": costs.never_at_once,
            "total": costs.memory,
            "of_pipeline_rank": costs.heaviest,
            "in_host_memory": costs.host,
        },
        "bytes_sent_per_step": {**_sent(costs), "total": costs.sent},
        "fits": None if device_bytes is None else fits(costs, device_bytes),
    }


def holdings(layout: ParallelDims, layers: int) -> Iterator[tuple[int, range, list[str]]]:
    """For every pipeline rank: its number, the ranks that share that place, and what they hold."""
    group = layout.world_size // layout.pp
    for rank in range(layout.pp):
        held = []
        for stage in layout.stages_of(rank):
            part = layout.layers_of(stage, layers)
            held += ["embedding"] if stage == 0 else []
            held.append(f"layers {part[0]} to {part[-1]}" if len(part) > 1 else f"layer {part[0]}")
            held += ["final norm and head"] if stage == layout.pipeline_stages - 1 else []
        yield rank, range(rank * group, (rank + 1) * group), held


def vars_of(holding: tuple[int, range, list[str]]) -> dict[str, Any]:
    """One of `holdings` as JSON."""
    rank, ranks, held = holding
    return {"pipeline_rank": rank, "first_rank": ranks[0], "last_rank": ranks[-1], "holds": held}


def print_layout(plan: Plan, console: Console, device_bytes: int | None = None) -> None:
    """Where each rank stands, what it holds, what that costs, and whether it fits."""
    for line in parallel_lines(plan, device_bytes):
        console.print(line, highlight=False)


def parallel_lines(plan: Plan, device_bytes: int | None = None) -> Iterator[str]:
    """The lines of `print_layout`."""
    layout, costs = plan.parallel_dims, plan.footprint
    if layout.world_size > 1:
        yield (
            f"layout: pp {layout.pp} x dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard} x "
            f"cp {layout.cp} x tp {layout.tp} = {layout.world_size:,} ranks, tensor-parallel neighbours side by side"
        )
    if layout.pp > 1:
        yield (
            f"pipeline: {layout.schedule}, {layout.pipeline_stages} stages, {layout.microbatches} micro-batches of "
            f"{plan.local_batch_size // layout.microbatches}; idle {costs.bubble:.1%} of the time"
        )
        for rank, ranks, held in holdings(layout, plan.spec.layers):
            yield f"  pipeline rank {rank}: ranks {ranks[0]:,} to {ranks[-1]:,} hold {', '.join(held)}"
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in _memory(costs).items() if size)
    parts += f"; {_gib(costs.never_at_once)} GiB of these do not overlap in time" if costs.never_at_once else ""
    yield f"estimated memory per rank: {_gib(costs.memory)} GiB ({parts})"
    if costs.host:
        yield f"in the host's memory, a rank: {_gib(costs.host)} GiB (parameters, gradients, optimizer)"
    if costs.sent:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in _sent(costs).items() if size)
        yield f"sent by a rank in a step: {_gib(costs.sent)} GiB ({parts})"
    if device_bytes is not None:
        share = costs.memory / device_bytes
        verdict = "fits" if fits(costs, device_bytes) else "does NOT fit"
        yield f"{verdict}: {share:.0%} of {_gib(device_bytes)} GiB; {RESERVE:.0%} is kept free for what is not modelled"


def _memory(costs: Footprint) -> dict[str, int]:
    names = ("parameters", "gradients", "optimizer", "gathered", "activations", "logits", "working")
    return {name: getattr(costs, name) for name in names}


def _sent(costs: Footprint) -> dict[str, int]:
    return {name: getattr(costs, f"sent_{name}") for name in ("fsdp", "tensor", "context", "pipeline")}


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
