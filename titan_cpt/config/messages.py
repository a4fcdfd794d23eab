"""Messages for pydantic's errors, in terms of the TOML file: dotted key, allowed values, value found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from titan_cpt.common.text import did_you_mean, quoted_list
from titan_cpt.config.schema_lookup import bounds_of, field_of, interval, keys_of, tables_at

_BOUND_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false", "string": "a string"}


_TAGS = ("[key]", "[table]", "[off]")  # of the schema's unions, beside the names of schedules


def error_message(error: Any, raw: dict[str, Any]) -> str:
    """One of pydantic's errors as `dotted.key: what is allowed, got the value found`.

    Args:
        error: an item of `ValidationError.errors()`.
        raw: the tables that were validated.
    """
    where = _dotted(error["loc"], raw)
    got = _shortened(error["input"])
    match error["type"]:
        case "titan":
            return f"{where}: {error['ctx']['message']}"
        case "missing":
            return f"{where}: is missing{_description(error['loc'])}{_table_to_add(error['loc'])}"
        case "extra_forbidden":
            return f"{where}: unknown key{_known_keys(error['loc'])}"
        case "union_tag_invalid" | "literal_error":
            return _not_a_choice(error, where)
        case "union_tag_not_found":
            return f'{where}.schedule: is missing; give a schedule such as "cosine"'
        case "model_type" | "model_attributes_type" | "dict_type":
            example = " such as {}" if error["input"] is True else ""  # {}: the defaults, as in wandb = {}
            return f"{where}: must be a table{example}, got {got}"
        case "tuple_type":
            example = f" such as [{got}]" if isinstance(error["input"], str) else ""
            return f"{where}: must be a list{example}, got {got}"
        case "too_short":
            return f"{where}: must have at least one entry"
    if error["type"] in _BOUND_ERRORS:
        return f"{where}: must be {interval(bounds_of(error['loc']))}, got {got}"
    if error["type"] == "finite_number":
        return f"{where}: must be a finite number, got {got}"
    kind = _KINDS.get(error["type"].split("_")[0])
    return f"{where}: must be {kind}, got {got}" if kind else f"{where}: {error['msg']}, got {got}"


def _not_a_choice(error: Any, where: str) -> str:
    context = error.get("ctx", {})
    allowed = context.get("expected_tags") or context.get("expected")
    choices = [word.strip("' ") for word in str(allowed).replace(" or ", ", ").split(",")]
    key = f"{where}.schedule" if error["type"] == "union_tag_invalid" else where
    value = context.get("tag", error["input"])
    hint = did_you_mean(str(value), choices)
    return f"{key}: must be one of {quoted_list(choices)}, got {_shortened(value)}{hint}"


_KEYS_OF_STAGES = ("steps", "tokens", "lr", "lr_scheduler", "warmup_steps", "warmup", "init", "replay")


def _known_keys(location: Sequence[Any]) -> str:
    """A hint to the key that was meant, or all keys of the table."""
    key = str(location[-1])
    if str(location[0]) in ("training", "optimizer", "lr_scheduler") and key in _KEYS_OF_STAGES:
        return "; each of the [[stages]] has its own steps or tokens, lr (with its warm-up), init and replay"
    known = sorted({name for table in tables_at(location[:-1]) for name in keys_of(table)})
    return did_you_mean(key, known) or f"; allowed here are {quoted_list(known)}"


def _dotted(location: Sequence[Any], raw: Any) -> str:
    """A location as a user writes it: stages by name, without the tags of the schema's unions.

    ("stages", 1, "lr", "cosine", "max") is stages.german.lr.max.
    """
    parts: list[str] = []
    for depth, part in enumerate(location):
        if isinstance(raw, list) and isinstance(part, int):
            raw = raw[part] if part < len(raw) else None
            parts.append(_stage_name(raw["name"]) if isinstance(raw, dict) and "name" in raw else f"[{part}]")
        elif isinstance(raw, dict) and part in raw:
            raw = raw[part]
            parts.append(str(part))
        else:
            is_tag = part in _TAGS or (isinstance(raw, dict) and raw.get("schedule") == part)
            if depth == len(location) - 1 and not is_tag:
                parts.append(str(part))
    return ".".join(parts)


def _stage_name(name: Any) -> str:
    """The name, in quotes if it is not a valid one: its dots would look like levels of the key."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w/-]+", name) else repr(name)


def _table_to_add(location: Sequence[Any]) -> str:
    """What to write where a whole table of the file is missing."""
    if len(location) > 1:
        return ""
    name = str(location[0])
    return "; add one [[stages]] for each stage of the training" if name == "stages" else f"; add [{name}]"


def _description(location: Sequence[Any]) -> str:
    """The first line of the key's description."""
    for table in tables_at(location[:-1]):
        if location[-1] in keys_of(table) and (text := field_of(table, str(location[-1])).description):
            return ": " + str(text).split("\n")[0].rstrip(".")
    return ""


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
