"""Numbers for people, in few characters: counts, durations, losses, memory. None of them is longer than its column."""

from __future__ import annotations

import math
from collections.abc import Sequence

_DURATION_UNITS = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s"))
_LONGEST_DAYS = 9_999
_THREE_DIGITS = (".2f", ".1f", ".0f")  # in four characters


def shortest_count(number: float, digits: int = 4) -> str:
    """A count with a suffix for thousands (K), millions (M), billions (B) or trillions (T): 614.4K."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.{digits}g}{unit}"
    return f"{number:.{digits}g}"


def rate(per_second: float) -> str:
    """A throughput in at most 6 characters: 987, 9,876, 12.3K, 1.23M; "?" if it is unknown."""
    if not math.isfinite(per_second) or per_second < 0:
        return "?"
    if per_second < 9_999.5:
        return f"{per_second:,.0f}"
    return _with_suffix(per_second)


def steps(count: int) -> str:
    """A number of steps in at most 9 characters: 1,234,567, or 12.3M."""
    text = f"{count:,}"
    return text if len(text) <= 9 else _with_suffix(count)


def duration(seconds: float) -> str:
    """A duration in at most 6 characters: 42s, 5m20s, 3h07m, 2d04h, 120d; "?" if it is unknown."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    whole = round(seconds)
    if whole >= 100 * 86_400:
        days = whole // 86_400
        return f"{days}d" if days <= _LONGEST_DAYS else f">{_LONGEST_DAYS}d"
    for size, unit, part, part_unit in _DURATION_UNITS:
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02}{part_unit}"
    return f"{whole}s"


def loss(nats: float, width: int = 7) -> str:
    """A loss with four decimals, or as many as fit."""
    return fit(nats, width, (".4f", ".3f", ".2f", ".1f", ".3e", ".2e", ".1e", ".0e"))


def significant(value: float, width: int) -> str:
    """Three significant digits, or as many as fit: 1.23, 0.0123, 1.2e-05."""
    return fit(value, width, ("#.3g", ".2g", ".1g", ".0e")).removesuffix(".")


def scientific(value: float, width: int = 8) -> str:
    """A learning rate: 3.00e-04."""
    return fit(value, width, (".2e", ".1e", ".0e"))


def memory(gib: float) -> str:
    """Memory in at most 7 characters: 51MiB, 0.53GiB, 42.1GiB, 123GiB, 1.46TiB; "?" if it is unknown or absurd."""
    if not 0 <= gib < 9_999 * 1024:
        return "?"
    if gib < 0.0995:
        return f"{gib * 1024:.0f}MiB"
    if gib < 999.5:
        return f"{fit(gib, 4, _THREE_DIGITS)}GiB"
    return f"{fit(gib / 1024, 4, _THREE_DIGITS)}TiB"


def share(fraction: float) -> str:
    """A share of one in percent in at most 4 characters; "?" if it is unknown or absurd."""
    return f"{fraction:.0%}" if math.isfinite(fraction) and 0 <= fraction < 9.995 else "?"


def fit(value: float, width: int, formats: Sequence[str]) -> str:
    """The first of these formats in which a value has at most `width` characters, else the last."""
    return next((text for form in formats if len(text := format(value, form)) <= width), format(value, formats[-1]))


def _with_suffix(number: float) -> str:
    """Three significant digits and a suffix, in at most 6 characters 12.3K, 1.23M."""
    for unit, size in (("K", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12)):
        if number < 999.5 * size:
            text = fit(number / size, 4, _THREE_DIGITS)
            return f"{text}{unit}"
    return f"{number:.0e}"
