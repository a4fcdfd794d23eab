"""What N future updates of the last stage's size cost: continual pre-training, or retraining on all data each time.

Continual pre-training costs the last stage again for each update. Retraining costs all stages of the plan and the new
data of all updates so far, each token at the FLOPs of its stage; the cost of N retrainings grows with N^2.

Source of the comparison: Ibrahim et al. 2024, arXiv:2403.08763: the baseline is training on the union of all data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.common.readable import shortest_count, significant
from titan_cpt.errors import DataError
from titan_cpt.planning.plan import Plan
from titan_cpt.planning.suggest import ASSUMED_EFFICIENCY, nearest_device
from titan_cpt.reporting.run_log import RunLog, read_run
from titan_cpt.reporting.sessions import sessions_of
from titan_cpt.reporting.summary import summarize_log

_ROWS = 12


@dataclass(frozen=True)
class UpdateCost:
    """Tokens and FLOPs of both ways from the first future update to this one, which is number `update`, from 1."""

    update: int
    continual_tokens: int
    continual_flops: float
    retraining_tokens: int
    retraining_flops: float


@dataclass(frozen=True)
class DeviceRate:
    """FLOP/s of one device in training.

    Attributes:
        mfu: share of the device's peak; None if that is unknown, as on a CPU.
        source: what the rate is from, in words.
        measured: from a run; otherwise an assumption.
    """

    flops_per_s: float
    mfu: float | None
    source: str
    measured: bool


def update_costs(plan: Plan, updates: int, trained_before: int = 0) -> list[UpdateCost]:
    """The costs of the first, second, ... future update, summed up.

    Args:
        updates: number of future updates, each with the tokens of the plan's last stage.
        trained_before: tokens on which the weights that the plan starts from were trained; retraining repeats them.
    """
    last = plan.stages[-1]
    tokens, flops = last.tokens, last.flops_per_token * last.tokens
    known_tokens = sum(stage.tokens for stage in plan.stages) + trained_before
    known_flops = sum(stage.flops_per_token * stage.tokens for stage in plan.stages)
    known_flops += plan.stages[0].flops_per_token * trained_before
    costs = []
    retraining_tokens, retraining_flops = 0, 0.0
    for update in range(1, updates + 1):
        retraining_tokens += known_tokens + update * tokens
        retraining_flops += known_flops + update * flops
        costs.append(UpdateCost(update, update * tokens, update * flops, retraining_tokens, retraining_flops))
    return costs


def measured_rate(folder: Path) -> DeviceRate:
    """The rate of a run that was trained, over all steps whose duration is recorded.

    Raises:
        DataError: the folder is not a run, or has too little to tell.
    """
    rate = _rate_of(read_run(folder))
    if rate is None:
        raise DataError(
            f"{folder}: has no recorded steps, or not their FLOPs or number of ranks: give another run with --measured"
        )
    return rate


def rate_or_assumption(folder: Path) -> DeviceRate:
    """The rate of the run in this folder if it has one; otherwise the assumption of `titan-cpt plan --suggest`."""
    try:
        return measured_rate(folder)
    except DataError:
        device = nearest_device(80 * 10**9)
        text = f"assumed: {ASSUMED_EFFICIENCY:.0%} of an {device.name}'s {device.flops / 1e12:.0f} TFLOP/s"
        return DeviceRate(device.flops * ASSUMED_EFFICIENCY, ASSUMED_EFFICIENCY, text, measured=False)


def _rate_of(run: RunLog) -> DeviceRate | None:
    seen = sessions_of(run)
    per_token: Mapping[str, Any] = {stage["name"]: stage.get("flops_per_token") for stage in run.plan["stages"]}
    flops = seconds = 0.0
    for stage in summarize_log(run)["stages"]:
        if isinstance(per_token[stage["name"]], int | float):
            flops += stage["timed_tokens"] * per_token[stage["name"]]
            seconds += stage["seconds"]
    if not (flops and seconds and seen.ranks):
        return None
    mfus = [] if seen.on_cpu else [line["mfu"] for line in run.trains if line.get("mfu")]
    mfu = sum(mfus) / len(mfus) if mfus else None
    of_peak = f", MFU {mfu:.1%}" if mfu is not None else ""
    text = f"measured in {run.folder} on {', '.join(seen.hardware)}{of_peak}"
    return DeviceRate(flops / seconds / seen.ranks, mfu, text, measured=True)


def update_lines(plan: Plan, costs: Sequence[UpdateCost], rate: DeviceRate, trained_before: int = 0) -> Iterator[str]:
    """The comparison as text: a table with a line for each update (of many, the first and the last ones), and notes."""
    last = plan.stages[-1]
    yield f"{len(costs)} future updates of the size of {last.name!r}, {shortest_count(last.tokens)} tokens each; sums"
    heads = ("tokens", "FLOPs", "device h")
    yield f"{'':7}{'continual pre-training':>30}{'retraining on all data':>32}"
    yield f"{'update':<7}" + "  ".join("".join(f"{head:>10}" for head in heads) for _ in range(2)) + f"{'ratio':>8}"
    shown = costs if len(costs) <= _ROWS else [*costs[: _ROWS - 1], costs[-1]]
    for cost in shown:
        cells = [
            f"{shortest_count(tokens):>10}{flops:>10.2e}{_hours(flops, rate):>10}"
            for tokens, flops in (
                (cost.continual_tokens, cost.continual_flops),
                (cost.retraining_tokens, cost.retraining_flops),
            )
        ]
        yield f"{cost.update:<7}" + "  ".join(cells) + f"{cost.continual_flops / cost.retraining_flops:>8.3f}"
    yield f"device hours at {rate.flops_per_s / 1e12:.4g} TFLOP/s per device, {rate.source}"
    if plan.stages[0].init != "random" and not trained_before:
        yield (
            "the tokens that the initial weights were trained on are unknown, so retraining is a lower bound: give "
            "them with --trained-before"
        )


def _hours(flops: float, rate: DeviceRate) -> str:
    return significant(flops / rate.flops_per_s / 3600, 8)


def updates_as_json(costs: Sequence[UpdateCost], rate: DeviceRate) -> dict[str, Any]:
    """The comparison for programs; sums from the first update on."""
    return {
        "rate": vars(rate),
        "costs": [
            {
                **vars(cost),
                "continual_device_hours": cost.continual_flops / rate.flops_per_s / 3600,
                "retraining_device_hours": cost.retraining_flops / rate.flops_per_s / 3600,
            }
            for cost in costs
        ],
    }
