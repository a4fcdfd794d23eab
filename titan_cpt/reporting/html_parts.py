"""Parts of the HTML report: sections, tables, links, and how their numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_cpt.reporting.figures import Figure


@dataclass(frozen=True)
class Link:
    """A cell that links to a file or folder; the page writes its address relative to itself."""

    text: str
    path: Path

    def __str__(self) -> str:
        """The text, as of other cells."""
        return self.text


@dataclass(frozen=True)
class HtmlTable:
    """A table: column heads, rows of text, and the (row, column) of cells in bold: the lowest number of a column.

    Attributes:
        summary: a text above the table; the table below it can be collapsed. Empty for a table that is always shown.
        is_open: whether it is shown at first.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str | Link]]
    best: frozenset[tuple[int, int]] = frozenset()
    summary: str = ""
    is_open: bool = True

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers, which are aligned right."""
        cells = [str(row[column]) for row in self.rows if str(row[column])]
        return bool(cells) and all(cell[0] in "+-0123456789" for cell in cells)

    def without_empty_columns(self) -> HtmlTable:
        """The table without columns that have no text in any row, such as MFU on a CPU; no cell is bold."""
        filled = [column for column in range(len(self.head)) if any(str(row[column]) for row in self.rows)]
        rows = [[row[column] for column in filled] for row in self.rows]
        return replace(self, head=[self.head[column] for column in filled], rows=rows, best=frozenset())


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        lead: one or two sentences below the title.
        details: (summary, text) of collapsed blocks; text is shown preformatted.
    """

    title: str
    lead: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[HtmlTable] = ()
    details: Sequence[tuple[str, str]] = ()


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
