"""What is wrong with a config, in words: pydantic's errors and broken references."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from typing import Any

from titan_cpt.common.text import did_you_mean, quoted_list
from titan_cpt.config.schema_lookup import field_of, keys_of, tables_at


def error_message(error: Any, raw: dict[str, Any]) -> str:
    """One of pydantic's errors as `dotted.key: what is allowed, got what`."""
    where = _dotted(error["loc"], raw)
    got, context, last = _shown(error["input"]), error.get("ctx", {}), str(error["loc"][-1])
    match error["type"]:
        case "titan":
            return f"{where}: " + str(context["message"])
        case "missing":
            return f"{where}: is missing{_about(error['loc'])}"
        case "extra_forbidden":
            known = sorted({key for model in tables_at(error["loc"][:-1]) for key in keys_of(model)})
            hint = _of_a_stage(error["loc"]) or did_you_mean(last, known) or "; allowed here are " + quoted_list(known)
            return f"{where}: unknown key{hint}"
        case "union_tag_invalid" | "literal_error":
            allowed = context.get("expected_tags") or context.get("expected")
            choices = [word.strip("' ") for word in str(allowed).replace(" or ", ", ").split(",")]
            key = f"{where}.schedule" if error["type"] == "union_tag_invalid" else where
            found = context.get("tag", error["input"])
            hint = did_you_mean(str(found), choices)
            return f"{key}: must be one of {quoted_list(choices)}, got {_shown(found)}{hint}"
        case "union_tag_not_found":
            return f'{where}.schedule: is missing; give a schedule such as "cosine"'
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{where}: must be a table, got {got}"
        case "tuple_type":
            return f"{where}: must be a list, got {got}"
        case "too_short":
            return f"{where}: must hold at least one entry"
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if error["type"] in bounds:
        return f"{where}: must be {_range(error['loc'])}, got {got}"
    kinds = {"int": "an integer", "float": "a number", "bool": "true or false", "string": "a string"}
    kind = kinds.get(error["type"].split("_")[0])
    return f"{where}: must be {kind}, got {got}" if kind else f"{where}: {error['msg']}, got {got}"


_OF_A_STAGE = ("steps", "tokens", "lr", "lr_scheduler", "warmup_steps", "warmup", "init", "replay")


def _of_a_stage(location: Sequence[Any]) -> str:
    """Where steps, budget and learning rate are set, for those who look for them in [training] or [optimizer]."""
    if str(location[0]) not in ("training", "optimizer", "lr_scheduler") or str(location[-1]) not in _OF_A_STAGE:
        return ""
    return "; each of the [[stages]] has its own steps or tokens, lr (with its warm-up), init and replay"


def _dotted(location: Sequence[Any], raw: Any) -> str:
    """The location as a user would write it: stages by name, no tags of the schema's unions."""
    parts: list[str] = []
    for place, part in enumerate(location):
        if isinstance(raw, list) and isinstance(part, int):
            raw = raw[part] if part < len(raw) else None
            parts.append(_stage_name(raw["name"]) if isinstance(raw, dict) and "name" in raw else f"[{part}]")
        elif isinstance(raw, dict) and part in raw:
            raw = raw[part]
            parts.append(str(part))
        elif (
            place == len(location) - 1
            and part != "[key]"
            and not (isinstance(raw, dict) and raw.get("schedule") == part)
        ):
            parts.append(str(part))
    return ".".join(parts)


def _stage_name(name: Any) -> str:
    """In quotes where it is no name, so that it can be told from the dots around it."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w/-]+", name) else repr(name)


def _about(location: Sequence[Any]) -> str:
    for model in tables_at(location[:-1]):
        if location[-1] in keys_of(model) and (about := field_of(model, str(location[-1])).description):
            return ": " + str(about).split("\n")[0].rstrip(".")
    return ""


def _range(location: Sequence[Any]) -> str:
    """The bounds of a key as an interval, such as [0, 1) or > 0."""
    bounds: dict[str, Any] = {}
    for model in tables_at(location[:-1]):
        if location[-1] in keys_of(model):
            field = field_of(model, str(location[-1]))
            for part in [*field.metadata, *(m for a in typing.get_args(field.annotation) for m in _metadata(a))]:
                for name in ("gt", "ge", "lt", "le"):
                    value = getattr(part, name, None)
                    bounds |= {} if value is None else {name: value}
    low = f"({bounds['gt']:g}" if "gt" in bounds else f"[{bounds['ge']:g}" if "ge" in bounds else ""
    high = f"{bounds['lt']:g})" if "lt" in bounds else f"{bounds['le']:g}]" if "le" in bounds else ""
    if low and high:
        return f"in {low}, {high}"
    only = next(iter(bounds.items()), ("ge", 0))
    return f"{ {'gt': '>', 'ge': '>=', 'lt': '<', 'le': '<='}[only[0]] } {only[1]:g}"


def _metadata(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for part in getattr(annotation, "__metadata__", ()):
        found += getattr(part, "metadata", [part])
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
