"""The learning-rate schedule of a stage: from its `lr` table to phases in steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from titan_cpt.common.numbers import parse_steps, parse_tokens
from titan_cpt.config.lr import ConstantLR, CosineLR, InfiniteCosineLR, InfiniteInvSqrtLR, InvSqrtLR, LinearLR, WsdLR
from titan_cpt.config.stages import StageConfig
from titan_cpt.data.batch_sizes import BatchSizes
from titan_cpt.planning import lr_schedules

DEFAULT_MIN_DIVISOR = 10  # eta_min = 0.1 * eta_max: Ibrahim et al. 2024, arXiv:2403.08763, section 4.1
_END_POINTS = ("warmup_until", "cooldown_until", "constant_until", "decay_from", "timescale")


def end_points(stage: StageConfig, steps: int, batch_sizes: BatchSizes, *, seq_len: int) -> dict[str, Fraction]:
    """The end points of the schedule's phases in steps, exact: 0.29 of 100 steps is 29, not 28.999..."""
    points = {}
    for name in _END_POINTS:
        if hasattr(stage.lr, name):
            points[name] = _in_steps(getattr(stage.lr, name), steps, batch_sizes, seq_len=seq_len)
    return points


def schedule_of(stage: StageConfig, steps: int, points: Mapping[str, Fraction]) -> lr_schedules.Schedule:
    """The phases of the stage's schedule.

    Raises:
        ValueError: the end points are out of order, or the schedule cannot reach its final LR.
    """
    lr = stage.lr
    final = final_lr(stage)
    at = {name: float(point) for name, point in points.items()}
    match lr:
        case CosineLR():
            return lr_schedules.cosine_schedule(**at, end=steps, peak=lr.max, final=final)
        case LinearLR():
            return lr_schedules.linear_schedule(**at, end=steps, peak=lr.max, final=final)
        case ConstantLR():
            return lr_schedules.constant_schedule(**at, end=steps, peak=lr.max)
        case InfiniteCosineLR() | InfiniteInvSqrtLR():
            return lr_schedules.infinite_schedule(
                **at,
                cooldown="cosine" if isinstance(lr, InfiniteCosineLR) else "inv_sqrt",
                alpha=lr.alpha if isinstance(lr, InfiniteInvSqrtLR) else 1.0,
                end=steps,
                peak=lr.constant if lr.max is None else lr.max,
                constant_lr=lr.constant,
                final=final,
            )
        case WsdLR():
            return lr_schedules.wsd_schedule(**at, end=steps, peak=lr.max, final=final, decay=lr.decay)
        case InvSqrtLR():
            return lr_schedules.inv_sqrt_schedule(**at, end=steps, peak=lr.max, floor=final)


def final_lr(stage: StageConfig) -> float:
    """The LR that the schedule decays to: `min`, or a tenth of the highest LR."""
    lr = stage.lr
    if isinstance(lr, ConstantLR):
        return lr.max
    top = lr.constant if isinstance(lr, InfiniteCosineLR | InfiniteInvSqrtLR) and lr.max is None else lr.max
    assert top is not None, "every schedule has a highest LR"
    return top / DEFAULT_MIN_DIVISOR if lr.min is None else lr.min


def pre_anneal_step(steps: int, points: Mapping[str, Fraction]) -> int | None:
    """Steps done at the end of the constant phase of an infinite or wsd schedule; None if nothing follows it."""
    point = points.get("constant_until", points.get("decay_from"))
    return None if point is None or point >= steps else math.floor(point)


def final_window(steps: int, span: int, every: int) -> tuple[int, ...]:
    """Steps after which the final loss is sampled: every `every` of the last `span` steps, and the last step.

    With 100 and 10 there are ten samples, as in the paper: the mean over the last 100 iterations sampled every 10
    (Ibrahim et al. 2024, arXiv:2403.08763, section 5).
    """
    return tuple(sorted(steps - back for back in range(0, span, every) if steps - back > 0))


def _in_steps(position: str | float, steps: int, batch_sizes: BatchSizes, *, seq_len: int) -> Fraction:
    """A position in steps: "12.5 steps", "300B" tokens, a share of the stage (float) or a number of steps (int)."""
    if isinstance(position, str):
        if position.endswith(" steps"):
            return parse_steps(position)
        return batch_sizes.step_at(Fraction(parse_tokens(position), seq_len))
    return Fraction(str(position)) * steps if isinstance(position, float) else Fraction(position)
