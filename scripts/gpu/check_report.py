"""Rows of results, the table that is printed at the end, and the JSON file."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, INFO, SKIPPED = "ok", "FAILED", "-", "skipped"
FILES = ("check.json", "check.md", "logs.txt")
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
    """The results of all sections; written to `folder` after each, so that an aborted run leaves its results.

    Attributes:
        names: of all sections, in the order of the table.
    """

    folder: Path
    names: list[str]
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

    def keep_earlier(self) -> None:
        """Make the folder; rename an earlier call's files in it to check-1.json and so on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while (self.folder / f"check-{number}.json").exists():
            number += 1
        for name in FILES:
            path = self.folder / name
            if path.exists():
                path.rename(path.with_stem(f"{path.stem}-{number}"))
        (self.folder / FILES[0]).touch()  # an error now is better than one after nine minutes
        (self.folder / FILES[0]).unlink()

    def write(self) -> None:
        """Write check.json and check.md, with the rows in the order of the sections' names."""
        with self._lock:
            self.rows.sort(key=lambda row: self.names.index(row.section))  # stable
            body = {
                **self.about,
                "sections": self.sections,
                "rows": [asdict(row) for row in self.rows],
                "figures": self.figures,
            }
            self._write("check.json", json.dumps(body, indent=1))
            self._write("check.md", self.table() + "\n")

    def write_logs(self, folder: Path, limit_bytes: int = 20_000) -> None:
        """Collect the end of every log in one file."""
        logs = sorted(folder.rglob("*.log"))
        ends = (f"==== {log.relative_to(folder)}\n{log.read_text(errors='replace')[-limit_bytes:]}\n" for log in logs)
        self._write("logs.txt", "".join(ends))

    def _write(self, name: str, text: str) -> None:
        """Write a file. A full disk ends no section: the table is printed in any case."""
        path = self.folder / name
        try:
            temporary = path.with_suffix(".part")
            temporary.write_text(text)
            temporary.replace(path)
        except OSError as error:
            print(f"check.sh: {path} was not written: {error.strerror}", file=sys.stderr, flush=True)

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


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= width else text[: width - 3] + "..."
