"""Layouts for a number of ranks and a device, ranked by an estimate of a step's time. Pure; no device is asked.

The estimate is coarse and says what it is made of: products at half of the device's peak, the pipeline's idle time,
recomputation, and communication over links of two speeds, of which FSDP's and the pipeline's is hidden behind products.
Which device that is, its memory tells; `assumed` puts it into words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from titan_cpt.config.schema import Config
from titan_cpt.data.inventory import DataInventory
from titan_cpt.errors import PlanError
from titan_cpt.planning.memory import fits
from titan_cpt.planning.plan import Plan
from titan_cpt.planning.planner import make_plan

RANKS_OF_A_NODE = 8
REACHED = 0.5  # of every figure of a data sheet
NETWORK_BYTES_PER_S = 50e9  # what a rank sends between nodes: 400 Gbit/s
_RECOMPUTED = {"none": 0.0, "selective": 1 / 6, "full": 1 / 3}  # more work, as a share of forward and backward


@dataclass(frozen=True)
class Device:
    """Figures of a data sheet: memory in bytes, products in dense bfloat16, and what it sends inside a node."""

    name: str
    memory: float
    flops: float
    node_bytes_per_s: float


DEVICES = (
    Device("RTX 4090", 24e9, 165e12, 32e9),  # PCIe 4, one way, as the L40S
    Device("A100 40 GB", 40e9, 312e12, 300e9),
    Device("L40S", 48e9, 362e12, 32e9),
    Device("H100 SXM", 80e9, 989e12, 450e9),
    Device("H200", 141e9, 989e12, 450e9),
    Device("B200", 180e9, 2250e12, 900e9),
)
"""Those of NVIDIA's data sheets, by memory; the one whose memory is nearest stands for a device."""


def device_of(memory: int) -> Device:
    """The device whose figures are taken for one of so many bytes."""
    return min(DEVICES, key=lambda device: abs(device.memory / memory - 1))


def assumed(device: Device) -> str:
    """What the estimates rest on, in a sentence."""
    return (
        f"assumed: {REACHED:.0%} of an {device.name}'s {device.flops / 1e12:.0f} TFLOP/s in bfloat16, of "
        f"{device.node_bytes_per_s / 1e9:.0f} GB/s inside a node of {RANKS_OF_A_NODE} and of "
        f"{NETWORK_BYTES_PER_S / 1e9:.0f} GB/s between nodes; other figures change the order"
    )


@dataclass(frozen=True)
class Suggestion:
    """One layout that fits.

    Attributes:
        plan: of the config with `overrides`.
        overrides: what to write on the command line.
        step_s: the estimate.
        reason: what the step's time is made of.
    """

    plan: Plan
    overrides: dict[str, str]
    step_s: float
    reason: str


def suggestions(config: Config, inventory: DataInventory, world_size: int, device_bytes: int) -> list[Suggestion]:
    """All layouts tried that keep the rules and fit, the fastest first, at most one for each set of degrees.

    Raises:
        PlanError: none fits, or the config is wrong under every layout.
    """
    device = device_of(device_bytes)
    best: dict[tuple[int, ...], Suggestion] = {}
    error: PlanError | None = None
    for overrides in _candidates(config, world_size):
        try:
            plan = make_plan(_with(config, overrides), inventory, world_size)
        except PlanError as refused:
            error = refused
            continue
        if fits(plan.footprint, device_bytes):
            found = _estimated(plan, overrides, device)
            layout = plan.parallel_dims
            degrees = (layout.tp, layout.pp, layout.cp)
            if degrees not in best or found.step_s < best[degrees].step_s:
                best[degrees] = found
    if not best:
        why = f"; the last one tried: {error}" if error else ""
        raise PlanError(
            f"--suggest: no layout of {world_size} ranks keeps the rules and fits {device_bytes / 2**30:.0f} GiB{why}. "
            "Take more ranks, or a global_batch_size with more divisors"
        )
    return sorted(best.values(), key=lambda suggestion: suggestion.step_s)


def _candidates(config: Config, world_size: int) -> Iterator[dict[str, str]]:
    for tp in range(1, RANKS_OF_A_NODE + 1):
        for pp in (1, 2, 3, 4, 6, 8, 12, 16):
            if world_size % (tp * pp):
                continue
            share, left_over = divmod(config.training.global_batch_size, world_size // (tp * pp))
            if left_over:
                continue
            for rows in (size for size in (1, 2, 3, 4, 6, 8) if share % size == 0):
                for recompute in _RECOMPUTED:
                    yield {
                        "parallelism.tensor_parallel_degree": str(tp),
                        "parallelism.pipeline_parallel_degree": str(pp),
                        "parallelism.pipeline_parallel_microbatch_size": str(rows),
                        "training.local_batch_size": str(share if pp > 1 else rows),
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


def _estimated(plan: Plan, overrides: dict[str, str], device: Device) -> Suggestion:
    layout, costs = plan.parallel_dims, plan.footprint
    again = _RECOMPUTED[overrides["activation_checkpoint.mode"]]
    products = plan.spec.flops_per_token(plan.seq_len) * plan.step_tokens / plan.world_size / (device.flops * REACHED)
    computing = products * (1 + again) / (1 - costs.bubble)
    tensor = costs.traffic.tensor / (device.node_bytes_per_s * REACHED)
    network = device.node_bytes_per_s if plan.world_size <= RANKS_OF_A_NODE else NETWORK_BYTES_PER_S
    behind = (costs.traffic.fsdp + costs.traffic.pipeline) / (network * REACHED)
    step = computing + tensor + max(0.0, behind - computing)
    reason = (
        f"products {products:.2f} s, recomputed {again:.0%}, pipeline idle {costs.bubble:.0%}, tensor-parallel traffic "
        f"{tensor:.2f} s, other traffic {behind:.2f} s ({'hidden' if behind <= computing else 'not hidden'}); "
        f"{costs.memory / 2**30:.1f} GiB"
    )
    shown = {key: value for key, value in overrides.items() if layout.pp > 1 or "microbatch" not in key}
    return Suggestion(plan, shown, step, reason)
