"""Writes docs/config.md from the schema: `python scripts/docs/config_reference.py > docs/config.md`."""

from __future__ import annotations

import json
import typing

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from titan_cpt.config import schema

HEADER = """# Every key of the TOML

Made from the schema by `python scripts/docs/config_reference.py > docs/config.md`; a test holds the two together.

A position inside a stage is an END POINT: a float in [0, 1] is a share of the stage, an integer is a step, a string
such as "3B" is tokens. Any key is overridden on the command line by its dotted name, stages by theirs:
`--training.seq_len 512 --stages.german.replay.fraction 0.25`. `extends = "base.toml"` (or a list, later wins) lays a
file over others; stages are merged by name. Paths of data and outputs are relative to the working directory.
"""


def reference() -> str:
    """The whole page."""
    parts = [HEADER, *(_section(model) for model in _tables(schema.Config))]
    return "\n".join(parts)


def _tables(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The tables below a model, each once, in the order in which the file has them."""
    found: list[type[BaseModel]] = []
    for field in model.model_fields.values():
        for inner in _inner(field.annotation):
            found += [table for table in (inner, *_tables(inner)) if table not in found]
    return found


def _inner(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _inner(argument)]


def _section(model: type[BaseModel]) -> str:
    lines = [f"\n## {(model.__doc__ or '').strip()}\n", "| key | default | |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        about = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{field.alias or name}` | {_default(field)} | {about}{_choices(field.annotation)} |")
    return "\n".join(lines)


def _default(field: typing.Any) -> str:
    if field.is_required():
        return "required"
    value = field.default_factory() if field.default_factory else field.default
    if value is None or value == {} or value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    shown = list(value) if isinstance(value, tuple) else value
    return f"`{json.dumps(shown)}`"


def _choices(annotation: object) -> str:
    kinds = [annotation, *typing.get_args(annotation)]
    choices = [
        choice for kind in kinds if typing.get_origin(kind) is typing.Literal for choice in typing.get_args(kind)
    ]
    return f" One of {', '.join(f'`{choice}`' for choice in choices)}." if len(choices) > 1 else ""


if __name__ == "__main__":
    print(reference(), end="\n")
