"""Looking up tables and keys of the schema by their location in the TOML file."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from titan_cpt.config.schema import Config


def tables_at(location: Sequence[Any]) -> list[type[BaseModel]]:
    """The schema's tables that may stand at a location (several where it is a union)."""
    models: list[type[BaseModel]] = [Config]
    named = False
    for part in location:
        if named:  # part is which of the datasets, domains or stages
            named = False
            continue
        annotations = [field_of(model, part).annotation for model in models if part in keys_of(model)]
        named = any(typing.get_origin(annotation) in (dict, tuple) for annotation in annotations)
        stepped = [inner for annotation in annotations for inner in nested_tables(annotation)]
        tagged = [m for m in models if "schedule" in m.model_fields and part in typing.get_args(_annotation(m))]
        models = stepped or tagged or models
    return models


def _annotation(model: type[BaseModel]) -> Any:
    return model.model_fields["schedule"].annotation


def keys_of(model: type[BaseModel]) -> dict[str, str]:
    """{key as the TOML has it: field name} of a table."""
    return {field.alias or name: name for name, field in model.model_fields.items()}


def field_of(model: type[BaseModel], key: str) -> Any:
    """The field of a table's key."""
    return model.model_fields[keys_of(model)[key]]


def is_string(model: type[BaseModel], key: str) -> bool:
    """Whether the key takes text and nothing else."""
    if key not in keys_of(model):
        return False
    annotation = field_of(model, key).annotation
    members = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    return members == [str]


def nested_tables(annotation: Any) -> list[type[BaseModel]]:
    """Every table in a field's annotation, such as those of a union or of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in nested_tables(argument)]
