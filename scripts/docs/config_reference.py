"""Writes docs/config.md from the schema: `python scripts/docs/config_reference.py > docs/config.md`."""

from __future__ import annotations

import json
import textwrap
import types
import typing

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from titan_cpt.config import schema
from titan_cpt.config import types as value_types
from titan_cpt.config.schema_lookup import field_bounds, interval, nested_tables
from titan_cpt.config.sweep import SweepFitConfig

HEADER = """# Config reference

Look up a key of the TOML file here: its type, its default and its meaning. This page is generated from the schema
(`python scripts/docs/config_reference.py > docs/config.md`), and a test compares the two. A key without a default is
optional unless it is marked as required; its description says what "unset" means.

**End points.** A point within a stage, such as the end of the learning-rate warm-up, is given in one of three ways: a
float in [0, 1] is a fraction of the stage, an integer is a step, and a string such as "3B" is a number of tokens.

**Overrides.** Any key can be set on the command line by its dotted name, a stage's key by the name of the stage:
`--training.seq_len 512 --stages.german.replay.fraction 0.25`.

**`extends`.** `extends = "base.toml"`, or a list of files of which a later one wins, merges this file over others.
Stages are merged by name; any other list is replaced.

Paths of data and outputs are relative to the working directory.
"""


def reference() -> str:
    """The whole page."""
    title, text = " ".join(str(schema.Config.model_fields["sweep"].description).split()).split(". ", 1)
    text = textwrap.fill(text, 120)
    tables = [*map(_section, _tables(schema.Config)), f"\n## {title}.\n\n{text}", _section(SweepFitConfig)]
    return "\n".join([HEADER, *tables])


def _tables(table: type[BaseModel]) -> list[type[BaseModel]]:
    """The tables inside a table, each once, in the order of the schema."""
    found: list[type[BaseModel]] = []
    for field in table.model_fields.values():
        for inner in nested_tables(field.annotation):
            found += [each for each in (inner, *_tables(inner)) if each not in found]
    return found


def _section(table: type[BaseModel]) -> str:
    lines = [f"\n## {(table.__doc__ or '').strip()}\n", "| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in table.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{field.alias or name}` | {_type(field)} | {_default(field)} | {meaning} |")
    return "\n".join(lines)


def _default(field: typing.Any) -> str:
    if field.is_required():
        return "required"
    value = field.default_factory() if field.default_factory else field.default
    if value is None or value == {} or value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    shown = list(value) if isinstance(value, tuple) else value
    return f"`{json.dumps(shown)}`"


def _type(field: typing.Any) -> str:
    """The type of a field in a user's words, with its range."""
    kind, bounds = _kind(field.annotation, field.metadata), field_bounds(field)
    return f"{kind} {interval(bounds)}" if bounds else kind


def _kind(annotation: typing.Any, metadata: typing.Sequence[object] = ()) -> str:
    special = {value_types.EndPoint: "end point", value_types.Strings: "string or list"}
    special |= {value_types.StageMixture: "string or table"}
    special |= {value_types.Mixture: "string or table", value_types.Tokens: "tokens"}
    special |= {value_types.GlobalBatchSize: "integer or table"}
    special |= {value_types.OptimizerState: '`"reset"`, `"keep"`, `"warm:STEPS"`'}
    for known, words in special.items():
        inner, *rest = typing.get_args(known)
        if annotation == known or (annotation == inner and list(metadata)[: len(rest)] == rest):
            return words
    for each in metadata:
        if isinstance(each, value_types.OneOf) and each.names:
            return ", ".join(f"`{json.dumps(name)}`" for name in each.names) + " or a registered name"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(argument) for argument in arguments if argument is not type(None)))
    if origin is tuple:
        return "list of strings"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "table"
    return {int: "integer", float: "float", bool: "boolean", str: "string"}[annotation]


if __name__ == "__main__":
    print(reference())
