"""Rows of results, the table that is printed at the end, and the JSON file."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, INFO, SKIPPED = "ok", "FAILED", "-", "skipped"
_WIDTHS = (46, 8, 40, 34)  # columns of the table, in characters: 90 rows stay below 12,000 characters


@dataclass(frozen=True)
class Row:
    """One check: what was checked, how it ended, the value found and the one expected."""

    section: str
    check: str
    status: str
    value: str
    expected: str = ""


@dataclass
class Report:
    """The results of all sections; written to `folder` after each, so that an aborted run leaves its results."""

    folder: Path
    about: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)
    _began: float = field(default_factory=time.monotonic)

    def add(self, row: Row) -> None:
        """Add a row and print it."""
        with self._lock:
            self.rows.append(row)
            seconds = time.monotonic() - self._began
            print(f"[{seconds:5.0f} s] {row.section}: {row.check}: {row.status} {row.value}", flush=True)

    @property
    def failed(self) -> list[Row]:
        """The rows of checks that failed."""
        return [row for row in self.rows if row.status == FAILED]

    def write(self, names: list[str]) -> None:
        """Write check.json and check.md, with the rows in the order of the sections' names."""
        with self._lock:
            self._sort(names)
            body = {
                **self.about,
                "sections": self.sections,
                "rows": [asdict(row) for row in self.rows],
                "figures": self.figures,
            }
            (self.folder / "check.json").write_text(json.dumps(body, indent=1))
            (self.folder / "check.md").write_text(self.table() + "\n")

    def table(self) -> str:
        """A header with the machine, and a line for each check."""
        about = self.about
        lines = [
            f"{about.get('device')}, driver {about.get('driver')}, torch {about.get('torch')}, commit "
            f"{str(about.get('commit'))[:12]}, {about.get('date')}; text: {about.get('text')}",
            "",
            "| check | | value | expected |",
            "|---|---|---|---|",
        ]
        section = ""
        for row in self.rows:
            if row.section != section:
                section = row.section
                seconds = self.sections.get(section, {}).get("seconds")
                lines.append(f"| **{section}**{f', {seconds:.0f} s' if seconds is not None else ''} | | | |")
            cells = (row.check, row.status, row.value, row.expected)
            lines.append(
                "| " + " | ".join(_cut(cell, width) for cell, width in zip(cells, _WIDTHS, strict=True)) + " |"
            )
        counts = {status: sum(row.status == status for row in self.rows) for status in (OK, FAILED, SKIPPED)}
        lines.append("")
        lines.append(", ".join(f"{count} {status}" for status, count in counts.items()))
        return "\n".join(lines)

    def _sort(self, names: list[str]) -> None:
        self.rows.sort(key=lambda row: names.index(row.section))  # stable


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= width else text[: width - 3] + "..."
