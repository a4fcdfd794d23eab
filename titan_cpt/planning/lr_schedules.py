"""Learning-rate schedules: a schedule is a tuple of phases, and `lr_at` evaluates it. Pure; no state, no torch.

t counts the optimizer steps of the stage from 1: the t-th step uses eta(t) of the paper, and no step has LR 0. A phase
covers (start, end]; its end point need not be a whole step. After the last phase the LR stays at its last value.

Source, unless a function names another: Ibrahim et al. 2024, arXiv:2403.08763, sections 4 and 7.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

PhaseShape = Literal["linear", "cosine", "inv_sqrt", "one_minus_sqrt", "exponential", "inv_sqrt_tail"]
DecayShape = Literal["linear", "sqrt", "exponential", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A phase of a schedule on (start, end], in steps, from lr_from (exclusive) to lr_to (reached at end).

    `parameter` is alpha for "inv_sqrt"; for "inv_sqrt_tail" it is the timescale in steps, and lr_to the floor.
    """

    name: str
    shape: PhaseShape
    start: float
    end: float
    lr_from: float
    lr_to: float
    parameter: float = 0.0


Schedule = tuple[Phase, ...]


def lr_at(schedule: Schedule, t: float) -> float:
    """The LR of the t-th step of the stage, t >= 0; after the end it stays at the last value.

    Raises:
        ValueError: t is negative.
    """
    if t < 0:
        raise ValueError(f"t must be >= 0, got {t}")
    for phase in schedule:
        if t <= phase.end:
            return _value(phase, t)
    return _value(schedule[-1], schedule[-1].end)


def phase_at(schedule: Schedule, t: float) -> str:
    """The name of the phase of the t-th step."""
    return next((phase.name for phase in schedule if t <= phase.end), schedule[-1].name)


def _value(phase: Phase, t: float) -> float:
    if phase.shape == "inv_sqrt_tail":
        elapsed = max(t - phase.start, 0.0)
        return max(phase.lr_to, phase.lr_from * math.sqrt(phase.parameter / (phase.parameter + elapsed)))
    if t >= phase.end:
        return phase.lr_to  # the formulas below are not exact at the end
    if t <= phase.start:
        return phase.lr_from
    x = (t - phase.start) / (phase.end - phase.start)
    if phase.shape == "exponential":
        return phase.lr_from * math.pow(phase.lr_to / phase.lr_from, x)
    return phase.lr_to + (phase.lr_from - phase.lr_to) * _remaining(phase, x)


def _remaining(phase: Phase, x: float) -> float:
    """The remaining share of the change from lr_from to lr_to at x in [0, 1]: 1 at x = 0, and 0 at x = 1."""
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
        "inv_sqrt": lambda x: 1 - _inv_sqrt_drop(phase.parameter, x) / _inv_sqrt_drop(phase.parameter, 1.0),
        "one_minus_sqrt": lambda x: 1 - math.sqrt(x),
    }
    return shapes[phase.shape](x)


def _inv_sqrt_drop(alpha: float, x: float) -> float:
    """h(x) = 1 / sqrt(1 + alpha x) - 1, decreasing from h(0) = 0; h(1) = -0.69849 for alpha = 10."""
    return 1 / math.sqrt(1 + alpha * x) - 1


def cosine_schedule(*, warmup_until: float, end: float, peak: float, final: float) -> Schedule:
    """Linear warm-up, then half a cosine that reaches `final` on the last step.

        lr(t) = peak * t / t_w                                                    0 < t <= t_w
        lr(t) = final + (peak - final) * (1 + cos(pi (t - t_w)/(end - t_w))) / 2  t_w < t <= end

    Args:
        warmup_until: t_w, in steps; 0 for no warm-up.
        end: the stage's last step.
        peak: LR at t_w.
        final: LR at `end`, may be 0.

    Raises:
        ValueError: end points out of order.
    """
    return _decaying("cosine", warmup_until, end, peak, final)


def linear_schedule(*, warmup_until: float, end: float, peak: float, final: float) -> Schedule:
    """Linear warm-up, then a straight line to `final` on the last step; arguments as for `cosine_schedule`."""
    return _decaying("linear", warmup_until, end, peak, final)


def _decaying(shape: PhaseShape, warmup_until: float, end: float, peak: float, final: float) -> Schedule:
    _check_order(warmup_until=warmup_until, end=end)
    decay = Phase(name="decay", shape=shape, start=warmup_until, end=end, lr_from=peak, lr_to=final)
    return _without_empty(_warmup(warmup_until, peak), decay)


def constant_schedule(*, warmup_until: float, end: float, peak: float) -> Schedule:
    """Linear warm-up, then constant at `peak`: the two constant baselines of the paper."""
    _check_order(warmup_until=warmup_until, end=end)
    return _without_empty(_warmup(warmup_until, peak), _flat("constant", warmup_until, end, peak))


def infinite_schedule(
    *,
    cooldown: Literal["cosine", "inv_sqrt"],
    warmup_until: float,
    cooldown_until: float,
    constant_until: float,
    end: float,
    peak: float,
    constant_lr: float,
    final: float,
    alpha: float = 10.0,
) -> Schedule:
    """The infinite schedule: warm-up, cool-down, constant, annealing (section 7.2).

        lr(t) = peak * t / t_cd                                           0 < t <= t_cd
        lr(t) = constant + (peak - constant) * (1 + cos(pi x)) / 2        t_cd < t <= t_const, cosine
        lr(t) = peak + (constant - peak) * h(x) / h(1)                    t_cd < t <= t_const, inv_sqrt
        lr(t) = constant                                                  t_const < t <= t_ann
        lr(t) = constant * (final / constant)^((t - t_ann)/(end - t_ann)) t_ann < t <= end

    with x = (t - t_cd) / (t_const - t_cd) and h(x) = 1/sqrt(1 + alpha x) - 1. The arguments are end points, not
    durations, as are the authors' 0.01 / 0.60 / 0.85.

    Args:
        cooldown: shape of the cool-down.
        warmup_until: t_cd; 0 together with cooldown_until = 0 starts at constant_lr, as a later stage does.
        cooldown_until: t_const.
        constant_until: t_ann; the stage does not anneal if it equals `end`.
        end: the stage's last step.
        peak: LR at t_cd; unused without warm-up and cool-down.
        constant_lr: LR of the constant phase.
        final: LR at `end`, above 0.
        alpha: steepness of an inv_sqrt cool-down.

    Raises:
        ValueError: the end points are out of order, the final LR is 0, or a cool-down of length 0 would jump from peak
            to constant.
    """
    _check_order(warmup_until=warmup_until, cooldown_until=cooldown_until, constant_until=constant_until, end=end)
    if final <= 0:
        raise ValueError("exponential annealing cannot reach 0: min must be above 0")
    if 0 < warmup_until == cooldown_until and peak != constant_lr:
        raise ValueError(
            "cooldown_until equals warmup_until, so the LR would jump from max to constant: "
            "make cooldown_until larger, or set both to 0 to start at constant"
        )
    cool = Phase(
        name="cooldown",
        shape=cooldown,
        start=warmup_until,
        end=cooldown_until,
        lr_from=peak,
        lr_to=constant_lr,
        parameter=alpha,
    )
    anneal = Phase(name="anneal", shape="exponential", start=constant_until, end=end, lr_from=constant_lr, lr_to=final)
    flat = _flat("constant", cooldown_until, constant_until, constant_lr)
    return _without_empty(_warmup(warmup_until, peak), cool, flat, anneal)


def wsd_schedule(
    *, warmup_until: float, decay_from: float, end: float, peak: float, final: float, decay: DecayShape
) -> Schedule:
    """Warm-up, stable, decay from decay_from to the end; decay "sqrt" is 1 - sqrt(x).

    Source: Hu et al. 2024, arXiv:2404.06395; the 1 - sqrt shape: Hägele et al. 2024, arXiv:2405.18392.

    Raises:
        ValueError: end points out of order, or an exponential decay to 0.
    """
    _check_order(warmup_until=warmup_until, decay_from=decay_from, end=end)
    if decay == "exponential" and final == 0:
        raise ValueError("an exponential decay cannot reach 0: min must be above 0, or choose another decay")
    shape: PhaseShape = "one_minus_sqrt" if decay == "sqrt" else decay
    stable = _flat("stable", warmup_until, decay_from, peak)
    fall = Phase(name="decay", shape=shape, start=decay_from, end=end, lr_from=peak, lr_to=final)
    return _without_empty(_warmup(warmup_until, peak), stable, fall)


def inv_sqrt_schedule(*, warmup_until: float, end: float, peak: float, floor: float, timescale: float) -> Schedule:
    """Warm-up, then an inverse square root without a fixed end.

        lr(t) = max(floor, peak * sqrt(timescale / (timescale + t - t_w)))        t > t_w

    Args:
        timescale: steps after the warm-up at which the LR is peak / sqrt(2), above 0.

    Source: Zhai et al. 2022, arXiv:2106.04560, section 3.5.

    Raises:
        ValueError: end points out of order or a timescale of 0.
    """
    _check_order(warmup_until=warmup_until, end=end)
    if timescale <= 0:
        raise ValueError(f"timescale must be above 0, got {timescale:g} steps")
    tail = Phase(
        name="decay",
        shape="inv_sqrt_tail",
        start=warmup_until,
        end=end,
        lr_from=peak,
        lr_to=floor,
        parameter=timescale,
    )
    return _without_empty(_warmup(warmup_until, peak), tail)


def _warmup(until: float, peak: float) -> Phase:
    return Phase(name="warmup", shape="linear", start=0.0, end=until, lr_from=0.0, lr_to=peak)


def _flat(name: str, start: float, end: float, lr: float) -> Phase:
    return Phase(name=name, shape="linear", start=start, end=end, lr_from=lr, lr_to=lr)


def _without_empty(*phases: Phase) -> Schedule:
    return tuple(phase for phase in phases if phase.end > phase.start)


def _check_order(**points: float) -> None:
    """Check that the end points are in this order, and the first is not negative."""
    names = list(points)
    if points[names[0]] < 0:
        raise ValueError(f"{names[0]} must not be negative, got step {points[names[0]]:g}")
    for earlier, later in itertools.pairwise(names):
        if points[earlier] > points[later]:
            limit = "the stage's end" if later == "end" else later
            raise ValueError(
                f"{earlier} is an end point and must not be after {limit}: "
                f"step {points[earlier]:g} is after step {points[later]:g}. A value below 1 is a fraction of the stage"
            )
