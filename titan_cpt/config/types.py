"""Value types of the config: token budgets, end points within a stage, names, and mixtures of datasets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
    PlainValidator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from titan_cpt.common.numbers import parse_steps, parse_tokens
from titan_cpt.common.plugins import registered, what_is_registered
from titan_cpt.common.text import did_you_mean, quoted_list
from titan_cpt.common.weights.patterns import pattern_problem

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WARM_UP = re.compile(r"warm:[1-9][0-9]{0,17}")
_LONGEST_NAME = 200  # file systems allow 255 bytes, and `anneal` appends to a run's name


def validation_error(message: str) -> PydanticCustomError:
    """The exception that a validator raises to report `message` word for word."""
    return PydanticCustomError("titan", "{message}", {"message": message})


def _token_budget(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = parse_tokens(value)
        except ValueError as error:
            raise validation_error(str(error)) from None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise validation_error(f'must be a number of tokens, 1 or more, such as "300B", got {value!r}')
    return value


def _global_batch_size(value: Any) -> Any:
    """A number of sequences, or a ramp: a table from tokens, as they were written, to numbers of sequences."""
    sizes = value if isinstance(value, dict) else {"0": value}
    for key, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            at = f" at {key!r} tokens" if isinstance(value, dict) else ""
            example = '{ "0" = 256, "5B" = 1024 }'
            raise validation_error(
                f"must be a number of sequences, 1 or more, or a ramp such as {example}, got {size!r}{at}"
            )
    begins: dict[int, str] = {}
    for key in sizes:
        try:
            same = begins.setdefault(parse_tokens(key), key)
        except ValueError as error:
            raise validation_error(f"the keys of a ramp are tokens of the stage: {error}") from None
        if same != key:
            raise validation_error(f"{same!r} and {key!r} are the same number of tokens: remove one of them")
    if 0 not in begins:
        raise validation_error(f'a ramp needs the key "0", the batch size at the beginning, got {quoted_list(sizes)}')
    return value


def _end_point(value: Any) -> Any:
    allowed = 'a fraction of the stage (a float in [0, 1]), a step (an integer) or tokens (such as "3B")'
    if isinstance(value, str):
        try:
            parse_steps(value) if value.endswith(" steps") else parse_tokens(value)
        except ValueError:
            raise validation_error(f"must be {allowed}, got {value!r}") from None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise validation_error(f"must be {allowed}, got {value!r}")
    elif isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise validation_error(
            f"a float is a fraction of the stage and must be in [0, 1], got {value!r}; write a step as an integer"
        )
    elif value < 0:
        raise validation_error(f"must not be negative, got {value!r}")
    return value


def _optimizer_state(value: Any) -> Any:
    if value in ("reset", "keep") or (isinstance(value, str) and _WARM_UP.fullmatch(value)):
        return value
    hint = did_you_mean(str(value), ["reset", "keep", "warm:100"])
    allowed = 'must be "reset", "keep" or "warm:STEPS" with a number of steps, such as "warm:100"'
    raise validation_error(f"{allowed}, got {value!r}{hint}")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise validation_error(f"must be letters, digits, '_' and '-', starting with a letter or digit, got {value!r}")
    return _not_too_long(value)


def _file_name(value: str) -> str:
    if not _FILE_NAME.fullmatch(value):
        allowed = "must be letters, digits, '.', '_' and '-', not starting with '.'"
        raise validation_error(f"is the name of a folder and {allowed}, got {value!r}")
    return _not_too_long(value)


def _not_too_long(value: str) -> str:
    if len(value) > _LONGEST_NAME:
        raise validation_error(f"must be at most {_LONGEST_NAME} characters, got {len(value)}")
    return value


def _one_or_many(value: Any) -> Any:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not values or not all(isinstance(v, str) and v for v in values):
        raise validation_error(f"must be a non-empty string or a non-empty list of them, got {value!r}")
    return tuple(values)


def _mixture(value: Any) -> Any:
    """A dataset, a list of datasets whose weights the plan computes, or a table of datasets and weights."""
    if isinstance(value, dict) and value:
        for name, weight in value.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise validation_error(f"the weight of {name!r} must be a number above 0, got {weight!r}")
        return dict(value)
    return _one_or_many(value)


def _patterns(value: Any) -> Any:
    """Patterns of weights, with valid syntax."""
    patterns = _one_or_many(value)
    for pattern in patterns:
        _check_pattern(pattern)
    return patterns


def _lr_scale(value: Any) -> Any:
    """A table from patterns of weights to factors of the learning rate."""
    example = '{ embedding = 0.1, "blocks.0-3" = 0.5 }'
    if not isinstance(value, dict) or not value:
        raise validation_error(f"must be a table from patterns of weights to factors, such as {example}, got {value!r}")
    for pattern, scale in value.items():
        if isinstance(scale, dict):
            raise validation_error(f"a pattern with a '.' must be in quotes, such as {example}; got {pattern!r}")
        _check_pattern(pattern)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            frozen = "; to freeze weights, leave them out of trainable" if scale == 0 else ""
            raise validation_error(f"the factor of {pattern!r} must be a number above 0, got {scale!r}{frozen}")
    return dict(value)


def _check_pattern(pattern: str) -> None:
    problem = pattern_problem(pattern)
    if problem is not None:
        raise validation_error(problem)


@dataclass(frozen=True)
class TokenMixture:
    """Datasets whose weights follow from their sizes: { of = [...], by = "tokens", temperature = 0.5, max_epochs = 4 }.

    Iterating gives the names, as for a list or table of datasets.

    Attributes:
        of: names of the datasets.
        temperature: exponent of the number of tokens, from 0 (equal weights) to 1 (in proportion to the tokens).
        max_epochs: how often a stage may repeat a dataset; None for no bound.
    """

    of: tuple[str, ...]
    temperature: float = 1.0
    max_epochs: float | None = None

    def __iter__(self) -> Iterator[str]:
        """The names of the datasets."""
        return iter(self.of)


_TOKEN_MIXTURE = '{ of = ["a", "b"], by = "tokens", temperature = 0.5, max_epochs = 4 }'


def _stage_mixture(value: Any) -> Any:
    """A mixture, or a table that gives the weights by tokens: `of` names datasets in it, and is not one itself."""
    if isinstance(value, TokenMixture) or not (isinstance(value, dict) and isinstance(value.get("of"), list | tuple)):
        return value if isinstance(value, TokenMixture) else _mixture(value)
    if unknown := sorted(set(value) - {"of", "by", "temperature", "max_epochs"}):
        raise validation_error(f"unknown key {unknown[0]!r} of a mixture by tokens, which is written {_TOKEN_MIXTURE}")
    if value.get("by") != "tokens":
        raise validation_error(f'a mixture with `of` needs by = "tokens", got {value.get("by")!r}: {_TOKEN_MIXTURE}')
    names = _one_or_many(value["of"])
    if len(set(names)) < len(names):
        raise validation_error(f"of names a dataset twice: {quoted_list(names)}")
    temperature, epochs = value.get("temperature", 1.0), value.get("max_epochs")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 1:
        raise validation_error(f"temperature must be a number from 0 to 1, got {temperature!r}")
    if epochs is not None and (
        isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < math.inf
    ):
        raise validation_error(f"max_epochs must be a number above 0, got {epochs!r}")
    return TokenMixture(names, float(temperature), None if epochs is None else float(epochs))


def _to_toml(value: Any) -> Any:
    """A tuple as TOML has it: a list, or its only item, such as the name of a stage's one dataset."""
    if isinstance(value, TokenMixture):
        table = {"of": list(value.of), "by": "tokens", "temperature": value.temperature}
        return table if value.max_epochs is None else {**table, "max_epochs": value.max_epochs}
    if not isinstance(value, tuple):
        return value
    return list(value) if len(value) > 1 else value[0]


EndPoint = Annotated[float | int | str, PlainValidator(_end_point), PlainSerializer(_to_toml)]
"""A point within a stage: a float in [0, 1] is a fraction of the stage, an integer a step, a string tokens ("3B")."""

GlobalBatchSize = Annotated[int | dict[str, int], PlainValidator(_global_batch_size)]
"""Sequences of a step, or a ramp: a table from tokens of the stage ("5B") to sequences, with the key "0"."""

OptimizerState = Annotated[Literal["reset", "keep"] | str, PlainValidator(_optimizer_state)]
"""reset, keep, or warm:STEPS."""

Tokens = Annotated[int, PlainValidator(_token_budget)]
Name = Annotated[str, AfterValidator(_name)]
FileName = Annotated[str, AfterValidator(_file_name)]
Strings = Annotated[tuple[str, ...], PlainValidator(_one_or_many), PlainSerializer(_to_toml)]
Mixture = Annotated[tuple[str, ...] | dict[str, float], PlainValidator(_mixture), PlainSerializer(_to_toml)]
WeightPatterns = Annotated[tuple[str, ...], PlainValidator(_patterns), PlainSerializer(_to_toml)]
LRScale = Annotated[dict[str, float], PlainValidator(_lr_scale)]
StageMixture = Annotated[
    tuple[str, ...] | dict[str, float] | TokenMixture, PlainValidator(_stage_mixture), PlainSerializer(_to_toml)
]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction01 = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class OneOf:
    """Annotation of a string: one of titan_cpt's own names, or one that an installed package registers.

    Attributes:
        names: titan_cpt's own; a package cannot replace them.
        group: the entry-point group of the others.
    """

    names: tuple[str, ...]
    group: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate the string, then the name."""
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: str) -> str:
        if value in self.names or value in registered(self.group):
            return value
        hint = did_you_mean(value, [*self.names, *registered(self.group)])
        shown = not hint or registered(self.group)
        of_packages = f"; {what_is_registered(self.group)} under {self.group}" if shown else ""
        own = f"one of {quoted_list(self.names)}" if self.names else f"a name registered under {self.group}"
        raise validation_error(f"must be {own}, got {value!r}{hint.rstrip('?') if of_packages else hint}{of_packages}")


class Table(BaseModel):
    """Base of all tables: frozen, without type coercion, and without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)
