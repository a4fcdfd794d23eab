"""Parallelism degrees for a number of ranks and a device, fastest first by an estimate of the step time.

The estimate is coarse: matmuls at half of the device's peak, the pipeline bubble, recomputation, and communication
over links of two speeds; FSDP and pipeline communication overlaps with computation. The device is the one of `DEVICES`
whose memory is nearest. Pure; no device is queried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from titan_cpt.config.schema import Config
from titan_cpt.data.inventory import DataInventory
from titan_cpt.errors import PlanError
from titan_cpt.planning.memory import fits
from titan_cpt.planning.plan import Plan, StagePlan
from titan_cpt.planning.planner import make_plan
from titan_cpt.planning.stages.own_batch import batch_sizes_of

RANKS_PER_NODE = 8
ASSUMED_EFFICIENCY = 0.5  # share of each data-sheet figure that training is assumed to reach
NETWORK_BYTES_PER_S = 50e9  # of one rank, between nodes: 400 Gbit/s
_RECOMPUTED = {"none": 0.0, "selective": 1 / 6, "full": 1 / 3}  # recomputed FLOPs, relative to forward and backward


@dataclass(frozen=True)
class Device:
    """Figures of a data sheet: memory in bytes, dense bfloat16 FLOP/s, and bytes per second between GPUs of a node."""

    name: str
    memory: float
    flops: float
    node_bytes_per_s: float


DEVICES = (
    Device("RTX 4090", 24e9, 165e12, 32e9),  # PCIe 4, one direction, as the L40S
    Device("A100 40 GB", 40e9, 312e12, 300e9),
    Device("L40S", 48e9, 362e12, 32e9),
    Device("H100 SXM", 80e9, 989e12, 450e9),
    Device("H200", 141e9, 989e12, 450e9),
    Device("B200", 180e9, 2250e12, 900e9),
)
"""From NVIDIA's data sheets, sorted by memory."""


def nearest_device(memory_bytes: int) -> Device:
    """The device with the nearest amount of memory."""
    return min(DEVICES, key=lambda device: abs(device.memory / memory_bytes - 1))


def assumptions(device: Device) -> str:
    """The assumptions of the estimates, in a sentence."""
    return (
        f"assumed: {ASSUMED_EFFICIENCY:.0%} of an {device.name}'s {device.flops / 1e12:.0f} TFLOP/s in bfloat16, of "
        f"{device.node_bytes_per_s / 1e9:.0f} GB/s inside a node of {RANKS_PER_NODE} and of "
        f"{NETWORK_BYTES_PER_S / 1e9:.0f} GB/s between nodes; the order depends on these"
    )


@dataclass(frozen=True)
class Suggestion:
    """Parallelism degrees and batch that fit the device.

    Attributes:
        plan: the plan of the config with `overrides`.
        overrides: values to set, by dotted key.
        step_s: estimated step time in seconds, the mean over all stages.
        reason: the parts of the step time, in words.
    """

    plan: Plan
    overrides: dict[str, str]
    step_s: float
    reason: str


def suggest(config: Config, inventory: DataInventory, world_size: int, device_bytes: int) -> list[Suggestion]:
    """Combinations of degrees that are valid and fit, fastest first; for each (tp, pp, cp) only the fastest batch.

    Raises:
        PlanError: none fits, or the config is invalid with all of them.
    """
    device = nearest_device(device_bytes)
    best: dict[tuple[int, ...], Suggestion] = {}
    error: PlanError | None = None
    for overrides in _candidates(config, world_size):
        try:
            plan = make_plan(_with(config, overrides), inventory, world_size, gpu_bytes=device_bytes)
        except PlanError as refused:
            error = refused
            continue
        if fits(plan.footprint, device_bytes):
            found = _estimate(plan, overrides, device)
            degrees = (plan.parallel_dims.tp, plan.parallel_dims.pp, plan.parallel_dims.cp)
            if degrees not in best or found.step_s < best[degrees].step_s:
                best[degrees] = found
    if not best:
        reason = f"; the last candidate: {error}" if error else ""
        raise PlanError(
            f"--suggest: no layout of {world_size} ranks is valid and fits {device_bytes / 2**30:.0f} GiB{reason}. "
            "Use more ranks, or a global_batch_size with more divisors"
        )
    return sorted(best.values(), key=lambda suggestion: suggestion.step_s)


def _candidates(config: Config, world_size: int) -> Iterator[dict[str, str]]:
    batches = [batch_sizes_of(config, stage) for stage in config.stages if stage.local_batch_size is None]
    whole = math.gcd(*(phase.size for sizes in batches for phase in sizes.phases)) or config.training.global_batch_size
    for tp in range(1, RANKS_PER_NODE + 1):
        for pp in (1, 2, 3, 4, 6, 8, 12, 16):
            if world_size % (tp * pp):
                continue
            local_batch, remainder = divmod(whole, world_size // (tp * pp))
            if remainder:
                continue
            for rows in (size for size in (1, 2, 3, 4, 6, 8) if local_batch % size == 0):
                for recompute in _RECOMPUTED:
                    yield {
                        "parallelism.tensor_parallel_degree": str(tp),
                        "parallelism.pipeline_parallel_degree": str(pp),
                        "parallelism.pipeline_parallel_microbatch_size": str(rows),
                        "training.local_batch_size": str(local_batch if pp > 1 else rows),
                        "activation_checkpoint.mode": recompute,
                    }


def _with(config: Config, overrides: dict[str, str]) -> Config:
    tables: dict[str, dict[str, object]] = {}
    for dotted, text in overrides.items():
        table, key = dotted.split(".")
        tables.setdefault(table, {})[key] = int(text) if text.isdecimal() else text
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=changed) for name, changed in tables.items()}
    )


def _estimate(plan: Plan, overrides: dict[str, str], device: Device) -> Suggestion:
    """The mean step time of all stages; the reason is that of the stage that takes longest."""
    estimates = [(stage, *_step_time(plan, stage, overrides, device)) for stage in plan.stages]
    steps = sum(stage.steps for stage in plan.stages)
    longest, step_s, reason = max(estimates, key=lambda each: each[0].steps * each[1])
    if len({time for _, time, _ in estimates}) > 1:
        step_s = sum(stage.steps * time for stage, time, _ in estimates) / steps
        reason = f"stage {longest.name!r}: {reason}"
    shown = {key: value for key, value in overrides.items() if plan.parallel_dims.pp > 1 or "microbatch" not in key}
    return Suggestion(plan, shown, step_s, reason)


def _step_time(plan: Plan, stage: StagePlan, overrides: dict[str, str], device: Device) -> tuple[float, str]:
    """The mean step time of a stage in seconds, and its parts in words."""
    costs = plan.footprints[stage.name]
    recomputed = _RECOMPUTED[overrides["activation_checkpoint.mode"]]
    flops_per_rank = stage.flops_per_token * (stage.tokens / stage.steps) / plan.world_size
    matmul_s = flops_per_rank / (device.flops * ASSUMED_EFFICIENCY)
    compute_s = matmul_s * (1 + recomputed) / (1 - costs.bubble)
    tensor_s = costs.traffic.tensor / (device.node_bytes_per_s * ASSUMED_EFFICIENCY)
    network = device.node_bytes_per_s if plan.world_size <= RANKS_PER_NODE else NETWORK_BYTES_PER_S
    overlapped_s = (costs.traffic.fsdp + costs.traffic.pipeline) / (network * ASSUMED_EFFICIENCY)
    step_s = compute_s + tensor_s + max(0.0, overlapped_s - compute_s)
    reason = (
        f"matmuls {matmul_s:.2f} s, recomputation {recomputed:.0%}, pipeline bubble {costs.bubble:.0%}, "
        f"tensor-parallel communication {tensor_s:.2f} s, other communication {overlapped_s:.2f} s "
        f"({'overlapped' if overlapped_s <= compute_s else 'not fully overlapped'}); {costs.memory / 2**30:.1f} GiB"
    )
    return step_s, reason
