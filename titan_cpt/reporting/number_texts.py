"""How tables and pages write losses, tokens, counts, dates and durations."""

from __future__ import annotations

from datetime import datetime, timezone


def number_text(value: float | None, *, sign: bool = False) -> str:
    """A loss or a difference of losses; empty for None."""
    return "" if value is None else f"{value:+.4f}" if sign else f"{value:.4f}"


def token_text(tokens: int) -> str:
    """A number of tokens with its unit, such as 2.949M."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if tokens >= size:
            return f"{tokens / size:.4g}{unit}"
    return str(tokens)


def count_text(count: int) -> str:
    """A count; empty for 0, which is the usual one of failures."""
    return f"{count:,}" if count else ""


def date_text(time: float | None) -> str:
    """Date and time in UTC, to the minute."""
    return "" if time is None else datetime.fromtimestamp(time, tz=timezone.utc).strftime("%Y-%m-%d %H:%M")


def duration_text(seconds: float | None) -> str:
    """A duration with two units at most, such as `3 h 20 min`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
