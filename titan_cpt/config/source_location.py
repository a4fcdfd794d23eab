"""Which of several TOML files, and which of its lines, a key with a fault was written in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from titan_cpt.config.toml_files import TomlFile

_HEADER = re.compile(r"\s*\[(\[)?([^\[\]]+)\]\]?\s*(?:#.*)?$")


def located(fault: str, files: Sequence[TomlFile]) -> str:
    """A fault `dotted.key: what is wrong`, with the file that the key stands in, and the line where it is plain.

    Args:
        files: in the order in which they are laid over each other: the last one that has the key counts.
    """
    parts = fault.partition(": ")[0].split(".")
    for source in reversed(files):
        if _holds(source.tables, parts):
            line = _line(source.text, parts)
            return f"{fault} ({source.path.name}{f', line {line}' if line else ''})"
    return fault


def _holds(table: Any, parts: Sequence[str]) -> bool:
    for part in parts:
        if isinstance(table, list):
            table = next((each for each in table if isinstance(each, dict) and each.get("name") == part), None)
        elif isinstance(table, dict):
            if part not in table:
                return False
            table = table[part]
        else:
            return False
    return table is not None


def _line(text: str, parts: Sequence[str]) -> int | None:
    """The one line that sets the key or begins its table; None where there is none or several could be meant."""
    found = [number for number, key in _keys(text) if key == list(parts)]
    inside = [number for number, key in _keys(text) if key == list(parts[:-1])]  # an inline table
    return found[0] if len(found) == 1 else inside[0] if not found and len(inside) == 1 else None


def _keys(text: str) -> Iterator[tuple[int, list[str]]]:
    """(line, dotted key in parts) of every line that sets a key or begins a table, stages by name."""
    table: list[str] = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        header = _HEADER.match(line)
        if header:
            table = _split(header[2])
            if header[1]:
                table = [*table, _name_below(lines[number:])]
            elif table[:1] == ["stages"]:
                table = [*_last_stage(lines[: number - 1]), *table[1:]]
            yield number, table
        elif match := re.match(r"\s*([A-Za-z0-9_.\"'-]+)\s*=", line):
            yield number, [*table, *_split(match[1])]


def _split(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]


def _name_below(lines: Sequence[str]) -> str:
    """The `name` of a [[stages]] table that begins here."""
    for line in lines:
        if _HEADER.match(line):
            break
        if match := re.match(r"\s*name\s*=\s*[\"']([^\"']*)", line):
            return match[1]
    return ""


def _last_stage(lines: Sequence[str]) -> list[str]:
    """The [[stages]] table that a header such as [stages.lr] belongs to: the one above it."""
    places = [place for place, line in enumerate(lines) if re.match(r"\s*\[\[\s*stages\s*\]\]", line)]
    return ["stages", _name_below(lines[places[-1] + 1 :])] if places else ["stages"]
