"""Setting one dotted key of the tables, from the command line or from a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from titan_cpt.common.text import did_you_mean, quoted_list
from titan_cpt.config.schema_lookup import is_string, tables_at
from titan_cpt.config.toml_files import exceeds_64_bits, parse_toml


def set_key(raw: dict[str, Any], dotted: str, value: Any = None, *, text: str | None = None) -> Iterator[str]:
    """Set one dotted key in place, stages by name; yields a fault instead where the path leads nowhere.

    Args:
        value: what the key gets.
        text: in the value's place what the command line says, read as the key's type asks.
    """
    parts = dotted.split(".")
    where = f"sweep.{dotted}" if text is None else f"--{dotted}"
    place: Any = raw
    for depth, part in enumerate(parts[:-1]):
        if isinstance(place, list):
            found = [stage for stage in place if isinstance(stage, dict) and stage.get("name") == part]
            if not found:
                known = [str(stage.get("name")) for stage in place if isinstance(stage, dict)]
                yield f"{where}: there is no stage {part!r}{did_you_mean(part, known)}; stages are {quoted_list(known)}"
                return
            place = found[0]
        elif isinstance(place, dict):
            place = place.setdefault(part, [] if depth == 0 and part == "stages" else {})
        else:
            yield f"{where}: {'.'.join(parts[:depth])} is a value, not a table"
            return
    if isinstance(place, list):
        yield f"{where}: is not a key; a stage's key is written stages.NAME.KEY"
    elif not isinstance(place, dict):
        yield f"{where}: {'.'.join(parts[:-1])} is a value, not a table"
    else:
        value = value if text is None else _value(parts, text)
        if exceeds_64_bits(value):
            yield f"{where}: integers must fit into 64 bits"
        else:
            place[parts[-1]] = value


def _value(parts: Sequence[str], text: str) -> Any:
    """The override's text as TOML reads it; a bare word, and whatever a string key is given, is a string."""
    if any(is_string(model, parts[-1]) for model in tables_at(parts[:-1])):
        return text
    try:
        read = parse_toml(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return read["value"] if len(read) == 1 else text
