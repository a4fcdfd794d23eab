"""The kinds of value a config is made of: token budgets, end points inside a stage, names, mixes of datasets."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

from titan_cpt.common.numbers import parse_steps, parse_tokens

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_NAME = 200  # a file system's limit is 255, and `anneal` adds to it


def fault(message: str) -> PydanticCustomError:
    """A validator's refusal in our own words."""
    return PydanticCustomError("titan", "{message}", {"message": message})


def _token_budget(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = parse_tokens(value)
        except ValueError as error:
            raise fault(str(error)) from None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise fault(f'must be a number of tokens, 1 or more, such as "300B", got {value!r}')
    return value


def _position(value: Any) -> Any:
    allowed = 'a share of the stage (a float in [0, 1]), a step (an integer) or tokens (such as "3B")'
    if isinstance(value, str):
        try:
            parse_steps(value) if value.endswith(" steps") else parse_tokens(value)
        except ValueError:
            raise fault(f"must be {allowed}, got {value!r}") from None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise fault(f"must be {allowed}, got {value!r}")
    elif isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise fault(f"is a share of the stage and must be in [0, 1], got {value!r}; a step is written as an integer")
    elif value < 0:
        raise fault(f"must not be negative, got {value!r}")
    return value


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise fault(f"must be letters, digits, '_' and '-', starting with a letter or digit, got {value!r}")
    return _not_too_long(value)


def _file_name(value: str) -> str:
    if not _FILE_NAME.fullmatch(value):
        raise fault(f"names a folder: letters, digits, '.', '_' and '-', not starting with '.', got {value!r}")
    return _not_too_long(value)


def _not_too_long(value: str) -> str:
    if len(value) > _LONGEST_NAME:
        raise fault(f"must be at most {_LONGEST_NAME} characters, got {len(value)}")
    return value


def _one_or_many(value: Any) -> Any:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not values or not all(isinstance(v, str) and v for v in values):
        raise fault(f"must be a string or a list of strings, not empty, got {value!r}")
    return tuple(values)


def _weights(value: Any) -> Any:
    """A name, a list of names, or a table of names to weights; a list's weights are left to the plan."""
    if isinstance(value, dict) and value:
        for name, weight in value.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise fault(f"the weight of {name!r} must be a number above 0, got {weight!r}")
        return dict(value)
    return _one_or_many(value)


def _written(value: Any) -> Any:
    """As a TOML file has it: a stage's dataset, for one, is a name and not a list of one."""
    if not isinstance(value, tuple):
        return value
    return list(value) if len(value) > 1 else value[0]


Position = Annotated[float | int | str, PlainValidator(_position), PlainSerializer(_written)]
"""An end point inside a stage: a float in [0, 1] is a share, an integer a step, a string such as "3B" tokens."""

Tokens = Annotated[int, PlainValidator(_token_budget)]
Name = Annotated[str, AfterValidator(_name)]
FileName = Annotated[str, AfterValidator(_file_name)]
Strings = Annotated[tuple[str, ...], PlainValidator(_one_or_many), PlainSerializer(_written)]
Mix = Annotated[tuple[str, ...] | dict[str, float], PlainValidator(_weights), PlainSerializer(_written)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction01 = Annotated[float, Field(ge=0, lt=1)]


class Table(BaseModel):
    """What all tables share: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)
