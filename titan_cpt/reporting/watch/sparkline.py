"""Curves as a line of block characters, for terminals."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = str.maketrans(f"{_BLOCKS}━─│", "__..--==#-|")
_SHARE_IN_RANGE = 0.9  # of the points; the first losses of a run would flatten all others


def sparkline(values: Sequence[float]) -> str:
    """A character for each value: the lowest block for the smallest, a blank for NaN.

    The highest block stands for the largest tenth of the values, because a training loss begins far above the rest.
    """
    known = sorted(value for value in values if math.isfinite(value))
    if not known:
        return " " * len(values)
    low = known[0]
    high = known[math.ceil(_SHARE_IN_RANGE * (len(known) - 1))]
    span = high - low
    top = len(_BLOCKS) - 1

    def block(value: float) -> str:
        if math.isnan(value):
            return " "
        if span <= 0 or not math.isfinite(value):
            return _BLOCKS[0] if value <= low else _BLOCKS[top]
        return _BLOCKS[min(top, max(0, round((value - low) / span * top)))]

    return "".join(map(block, values))


def bucket_means(steps: Sequence[int], values: Sequence[float], *, last_step: int, width: int) -> list[float]:
    """Mean of the values in each of `width` equal parts of the steps 0 to `last_step`; NaN where there is none.

    The cost does not depend on the number of values: at most 64 of each part are read.

    Args:
        steps: ascending.
    """
    means = []
    begin = 0
    for part in range(width):
        end = bisect_right(steps, (part + 1) * last_step // width, lo=begin)
        stride = max(1, (end - begin) // 64)
        chosen = [value for value in values[begin:end:stride] if math.isfinite(value)]
        means.append(sum(chosen) / len(chosen) if chosen else math.nan)
        begin = end
    return means


def carried_on(values: Sequence[float]) -> list[float]:
    """NaN after a value replaced with that value, up to the last one: a loss that is measured now and then."""
    last_known = max((index for index, value in enumerate(values) if not math.isnan(value)), default=-1)
    filled = []
    current = math.nan
    for index, value in enumerate(values):
        current = current if math.isnan(value) else value
        filled.append(current if index <= last_known else math.nan)
    return filled


def to_ascii(text: str) -> str:
    """The same curves and bars for terminals without UTF-8."""
    return text.translate(_ASCII)
