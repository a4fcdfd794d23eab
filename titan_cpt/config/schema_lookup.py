"""Which tables of the schema can be at a location of the TOML file, and which keys they have."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from titan_cpt.config.schema import Config
from titan_cpt.config.sweep import FIT, SweepFitConfig


def tables_at(location: Sequence[Any]) -> list[type[BaseModel]]:
    """The schema's tables that can be at a location; several where the schema has a union.

    ("datasets", "german", "source") gives [TextSourceConfig]: "german" is a user's name, not a key of the schema.
    ("stages", 0, "lr", "cosine") gives [CosineLR]: pydantic puts the schedule's name into a location.
    """
    tables: list[type[BaseModel]] = [Config]
    if tuple(location[:2]) == ("sweep", FIT):  # [sweep] is a free table, and this one is not
        tables, location = [SweepFitConfig], location[2:]
    is_users_name = False
    for part in location:
        if is_users_name:
            is_users_name = False
            continue
        annotations = [field_of(table, part).annotation for table in tables if part in keys_of(table)]
        is_users_name = any(typing.get_origin(annotation) in (dict, tuple) for annotation in annotations)
        nested = [inner for annotation in annotations for inner in nested_tables(annotation)]
        tables = nested or [table for table in tables if part in _schedules(table)] or tables
    return tables


def _schedules(table: type[BaseModel]) -> tuple[Any, ...]:
    schedule = table.model_fields.get("schedule")
    return () if schedule is None else typing.get_args(schedule.annotation)


def keys_of(table: type[BaseModel]) -> dict[str, str]:
    """{key in the TOML file: name of the field}; they differ for `from`, which is a Python keyword."""
    return {field.alias or name: name for name, field in table.model_fields.items()}


def field_of(table: type[BaseModel], key: str) -> Any:
    """The field of a key."""
    return table.model_fields[keys_of(table)[key]]


def takes_only_strings(table: type[BaseModel], key: str) -> bool:
    """Whether the table has the key, and its value can only be a string."""
    if key not in keys_of(table):
        return False
    annotation = field_of(table, key).annotation
    members = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    return members == [str]


def nested_tables(annotation: Any) -> list[type[BaseModel]]:
    """Every table in a field's annotation: the table itself, or the members of a union, list or dict."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for argument in typing.get_args(annotation) for table in nested_tables(argument)]


def dotted_keys(*, datasets: Sequence[str] = ("NAME",), stages: Sequence[str] = ("NAME",)) -> dict[str, list[Any]]:
    """{dotted key: annotations} of every key that the command line can override, in the order of the schema.

    A key of a union, such as that of the LR schedules, has the annotation of each of its tables.

    Args:
        datasets, stages: the names of the config's datasets and stages.
    """
    found: dict[str, list[Any]] = {}
    for key, annotation in _keys_below(Config, {"datasets": datasets, "stages": stages, "domains": ("NAME",)}):
        if annotation not in found.setdefault(key, []):
            found[key].append(annotation)
    return found


def _keys_below(table: type[BaseModel], names: dict[str, Sequence[str]], before: str = "") -> Iterator[tuple[str, Any]]:
    for key in keys_of(table):
        annotation = field_of(table, key).annotation
        tables = nested_tables(annotation)
        if not tables:
            yield before + key, annotation
        named = typing.get_origin(annotation) in (dict, tuple)
        for inner in tables:
            for name in names[key] if named else ("",):
                yield from _keys_below(inner, names, f"{before}{key}.{name}{'.' if name else ''}")


def bounds_of(location: Sequence[Any]) -> dict[str, Any]:
    """The bounds of the key at a location, as {"ge": 0, "lt": 1}; empty for a key without bounds."""
    bounds: dict[str, Any] = {}
    for table in tables_at(location[:-1]):
        if location[-1] in keys_of(table):
            bounds |= field_bounds(field_of(table, str(location[-1])))
    return bounds


def field_bounds(field: Any) -> dict[str, Any]:
    """The bounds of a field, also where its type is optional."""
    inner = (part for argument in typing.get_args(field.annotation) for part in _metadata(argument))
    return {
        name: getattr(part, name)
        for part in [*field.metadata, *inner]
        for name in ("gt", "ge", "lt", "le")
        if getattr(part, name, None) is not None
    }


def _metadata(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for part in getattr(annotation, "__metadata__", ()):
        found += getattr(part, "metadata", [part])
    return found


def interval(bounds: dict[str, Any]) -> str:
    """Bounds as an interval: "in [0, 1)" with two of them, "> 0" with one; ">= 0" without any."""
    shown = {name: _shown(value) for name, value in bounds.items()}
    low = f"({shown['gt']}" if "gt" in shown else f"[{shown['ge']}" if "ge" in shown else ""
    high = f"{shown['lt']})" if "lt" in shown else f"{shown['le']}]" if "le" in shown else ""
    if low and high:
        return f"in {low}, {high}"
    name, value = next(iter(shown.items()), ("ge", "0"))
    return f"{ {'gt': '>', 'ge': '>=', 'lt': '<', 'le': '<='}[name] } {value}"


def _shown(bound: float) -> str:
    """A large power of two as such: 2**63 is easier to read than 9.22337e+18."""
    if isinstance(bound, int) and bound >= 2**20 and bound & (bound - 1) == 0:
        return f"2**{bound.bit_length() - 1}"
    return f"{bound:g}"
