"""Parts of the HTML report: sections, tables, links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
