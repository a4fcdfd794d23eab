"""Learning-rate schedules: from the `lr` table of the first stage of a span to phases in steps of the span."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from titan_cpt.common.numbers import parse_steps, parse_tokens
from titan_cpt.config.lr import (
    ConstantLR,
    ContinueLR,
    CosineLR,
    InfiniteCosineLR,
    InfiniteInvSqrtLR,
    InvSqrtLR,
    LinearLR,
    WsdLR,
)
from titan_cpt.config.stages import StageConfig
from titan_cpt.planning import lr_schedules
from titan_cpt.planning.stages.lr_span import LRSpan

DEFAULT_MIN_DIVISOR = 10  # eta_min = 0.1 * eta_max: Ibrahim et al. 2024, arXiv:2403.08763, section 4.1
_END_POINTS = ("warmup_until", "cooldown_until", "constant_until", "decay_from", "timescale")


def end_points(span: LRSpan) -> dict[str, Fraction]:
    """The end points of the schedule's phases in steps of its span, exact: 0.29 of 100 steps is 29, not 28.999..."""
    lr = span.first.lr
    return {name: _in_steps(getattr(lr, name), span) for name in _END_POINTS if hasattr(lr, name)}


def schedule_of(span: LRSpan, points: Mapping[str, Fraction]) -> lr_schedules.Schedule:
    """The phases of a schedule, in steps of its span.

    Raises:
        ValueError: the end points are out of order, or the schedule cannot reach its final LR.
    """
    lr = span.first.lr
    steps = span.steps
    final = final_lr(span.first)
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
        case ContinueLR():
            raise AssertionError("the first stage of a span has a schedule of its own")


def final_lr(stage: StageConfig) -> float:
    """The LR that the schedule decays to: `min`, or a tenth of the highest LR."""
    lr = stage.lr
    assert not isinstance(lr, ContinueLR), "the first stage of a span has a schedule of its own"
    if isinstance(lr, ConstantLR):
        return lr.max
    top = lr.constant if isinstance(lr, InfiniteCosineLR | InfiniteInvSqrtLR) and lr.max is None else lr.max
    assert top is not None, "every schedule has a highest LR"
    return top / DEFAULT_MIN_DIVISOR if lr.min is None else lr.min


def pre_anneal_step(span: LRSpan, points: Mapping[str, Fraction], stage: StageConfig) -> int | None:
    """Steps of the stage done at the end of the constant phase of an infinite or wsd schedule.

    None if no annealing follows it, and in a stage of the span in which the annealing does not begin.
    """
    point = points.get("constant_until", points.get("decay_from"))
    if point is None or point >= span.steps:
        return None
    step = math.floor(point) - span.steps_before(stage.name)
    return step if 0 <= step < span.lengths[span.names.index(stage.name)].steps else None


def depends_on_end(schedule: lr_schedules.Schedule, steps: int) -> bool:
    """Whether the LR of the first `steps` steps of a schedule would change if it ended later.

    Only the last phase ends with the schedule; a constant phase and an inverse square root do not depend on their end.
    """
    last = schedule[-1]
    return last.start < steps and last.lr_from != last.lr_to and last.shape != "inv_sqrt_tail"


def final_window(steps: int, span: int, every: int) -> tuple[int, ...]:
    """Steps after which the final loss is sampled: every `every` of the last `span` steps, and the last step.

    With 100 and 10 there are ten samples, as in the paper: the mean over the last 100 iterations sampled every 10
    (Ibrahim et al. 2024, arXiv:2403.08763, section 5).
    """
    return tuple(sorted(steps - back for back in range(0, span, every) if steps - back > 0))


def _in_steps(position: str | float, span: LRSpan) -> Fraction:
    """A position in steps: "12.5 steps", "300B" tokens, a share of the span (float) or a number of steps (int)."""
    if isinstance(position, str):
        return parse_steps(position) if position.endswith(" steps") else span.step_at(parse_tokens(position))
    return Fraction(str(position)) * span.steps if isinstance(position, float) else Fraction(position)
