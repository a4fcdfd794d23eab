"""Finding the file and line in which a key was written, for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from titan_cpt.config.toml_files import TomlFile

_HEADER = re.compile(r"\s*\[(\[)?([^\[\]]+)\]\]?\s*(?:#.*)?$")


def with_location(fault: str, files: Sequence[TomlFile]) -> str:
    """A message `dotted.key: ...`, followed by the file that sets the key, and by the line if exactly one line sets it.

    Args:
        files: a base before the file that extends it; the last file that has the key is named.
    """
    parts = fault.partition(": ")[0].split(".")
    for source in reversed(files):
        if _has_key(source.tables, parts):
            line = _line(source.text, parts)
            return f"{fault} ({source.path.name}{f', line {line}' if line else ''})"
    return fault


def _has_key(table: Any, parts: Sequence[str]) -> bool:
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
    """The line that sets the key or begins its inline table; None unless exactly one line does."""
    exact = [number for number, key in _keys(text) if key == list(parts)]
    inline_table = [number for number, key in _keys(text) if key == list(parts[:-1])]
    candidates = exact or inline_table
    return candidates[0] if len(candidates) == 1 else None


def _keys(text: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, parts of the dotted key) of every line that sets a key or begins a table; stages by name."""
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
    """The `name` of the [[stages]] table that begins at these lines."""
    for line in lines:
        if _HEADER.match(line):
            break
        if match := re.match(r"\s*name\s*=\s*[\"']([^\"']*)", line):
            return match[1]
    return ""


def _last_stage(lines: Sequence[str]) -> list[str]:
    """The dotted key of the last [[stages]] table in these lines, to which a header such as [stages.lr] belongs."""
    headers = [index for index, line in enumerate(lines) if re.match(r"\s*\[\[\s*stages\s*\]\]", line)]
    return ["stages", _name_below(lines[headers[-1] + 1 :])] if headers else ["stages"]
