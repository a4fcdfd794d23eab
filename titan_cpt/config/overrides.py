"""Setting one dotted key of a config's tables, for the command line and for sweeps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from titan_cpt.common.text import did_you_mean, quoted_list
from titan_cpt.config.schema_lookup import tables_at, takes_only_strings
from titan_cpt.config.toml_files import exceeds_64_bits, parse_toml

_PATTERN = re.compile(r"(stages\.[^.]+\.lr_scale)\.(.+)", re.DOTALL)


def set_key(
    raw: dict[str, Any], dotted: str, value: Any = None, *, text: str | None = None, prefix: str = "sweep."
) -> Iterator[str]:
    """Set one dotted key in place; the key names a stage by its `name`. Yields a message if the key cannot be set.

    Args:
        value: the value to set, from a sweep or from Python.
        text: the value as typed on the command line, instead of `value`; it is parsed as TOML.
        prefix: what messages put before the key of a `value`.
    """
    parts = _parts(dotted)
    where = f"{prefix}{dotted}" if text is None else f"--{dotted}"
    table: Any = raw
    for depth, part in enumerate(parts[:-1]):
        if isinstance(table, list):
            matches = [stage for stage in table if isinstance(stage, dict) and stage.get("name") == part]
            if not matches:
                known = [str(stage.get("name")) for stage in table if isinstance(stage, dict)]
                yield f"{where}: there is no stage {part!r}{did_you_mean(part, known)}; stages are {quoted_list(known)}"
                return
            table = matches[0]
        elif isinstance(table, dict):
            table = table.setdefault(part, [] if depth == 0 and part == "stages" else {})
        else:
            yield f"{where}: {'.'.join(parts[:depth])} is a value, not a table"
            return
    if isinstance(table, list):
        yield f"{where}: is not a key; a stage's key is written stages.NAME.KEY"
    elif not isinstance(table, dict):
        yield f"{where}: {'.'.join(parts[:-1])} is a value, not a table"
    else:
        value = value if text is None else _parse_value(parts, text)
        if exceeds_64_bits(value):
            yield f"{where}: integers must fit into 64 bits"
        else:
            table[parts[-1]] = value


def _parts(dotted: str) -> list[str]:
    """The parts of a dotted key; what follows lr_scale is one of its patterns, in quotes or not, with its own dots."""
    pattern = _PATTERN.fullmatch(dotted)
    return [*pattern[1].split("."), pattern[2].strip("\"'")] if pattern else dotted.split(".")


def _parse_value(parts: Sequence[str], text: str) -> Any:
    """The text as a TOML value; as a string if it is not valid TOML, or if the key takes only strings."""
    if any(takes_only_strings(table, parts[-1]) for table in tables_at(parts[:-1])):
        return text
    try:
        parsed = parse_toml(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text
