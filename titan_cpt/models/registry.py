"""The model families and their named sizes. Does not import torch, because the training plan uses it.

To add a family: write a folder titan_cpt/models/<family> with model.py, spec.py, parallelize.py and huggingface.py, add
a line to `FAMILIES`, and the name to `model.family` in titan_cpt/config/model.py.
"""

import dataclasses
import importlib
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from titan_cpt.common.text import did_you_mean
from titan_cpt.errors import ConfigError
from titan_cpt.models.spec import ROPE_SCALINGS, ModelSpec, RopeScaling

FAMILIES: tuple[str, ...] = (
    "gpt_neox",  # the models of Ibrahim et al. 2024, Pythia
    "llama",  # Llama 2 and 3, Mistral, Qwen2.5, Qwen3
)
"""Names of the families: the values of model.family, and the folders in titan_cpt/models."""

VOCABULARY_MULTIPLE = 128
"""The vocabulary size is padded to a multiple of this number."""


def family_module(family: str, name: str) -> ModuleType:
    """Import titan_cpt/models/<family>/<name>.py. `model` and `parallelize` import torch; `spec`, `huggingface` do not.

    Raises:
        ConfigError: the family is unknown.
    """
    if family not in FAMILIES:
        raise ConfigError(_unknown("model.family", family, FAMILIES))
    return importlib.import_module(f"titan_cpt.models.{family}.{name}")


SPECS: Mapping[str, type[ModelSpec]] = {family: family_module(family, "spec").SPEC for family in FAMILIES}
"""Each family's spec class."""

SIZES: Mapping[str, tuple[str, ...]] = {family: spec.sizes() for family, spec in SPECS.items()}
"""Each family's named sizes."""


def named_size(family: str, size: str, tokenizer_vocab: int, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The spec of a named size for a tokenizer.

    The vocabulary size is that of the tokenizer or of the released model, whichever is larger, padded to a multiple of
    `VOCABULARY_MULTIPLE`. An overridden `vocab_size` is not padded.

    Args:
        family: one of `FAMILIES`.
        size: one of `SIZES[family]`.
        tokenizer_vocab: number of token ids of the tokenizer.
        overrides: fields of the family's spec, by name, that replace those of the size.

    Raises:
        ConfigError: the family, the size or an overridden field is unknown; the spec is invalid; or an overridden
            `vocab_size` is smaller than the tokenizer's.
    """
    overrides = dict(overrides or {})
    if family not in FAMILIES:
        raise ConfigError(_unknown("model.family", family, FAMILIES))
    if size not in SIZES[family]:
        raise ConfigError(_unknown("model.size", size, SIZES[family]))
    fields = [field.name for field in dataclasses.fields(SPECS[family]) if field.name != "family"]
    problems = [_unknown(f"model.{name}", name, fields) for name in overrides if name not in fields]
    if problems:
        raise ConfigError("\n".join(problems))
    if isinstance(scaling := overrides.get("rope_scaling"), Mapping):
        overrides["rope_scaling"] = RopeScaling(**scaling)

    released_vocab, chosen = SPECS[family].size_fields(size, overrides)
    vocab_size = round_up(max(released_vocab or 0, tokenizer_vocab), VOCABULARY_MULTIPLE)
    spec = SPECS[family](**{"family": family, "vocab_size": vocab_size, **chosen, **overrides})
    if spec.vocab_size < tokenizer_vocab:
        raise ConfigError(
            f"model.vocab_size: must be at least {tokenizer_vocab:,}, the number of tokens of the tokenizer, got "
            f"{spec.vocab_size:,}; remove it to get {vocab_size:,}"
        )
    return spec


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def spec_from_recipe(recipe: Mapping[str, Any]) -> ModelSpec:
    """The spec from the `model.*` keys of a run's recipe, as `ModelSpec.as_recipe` writes them.

    Raises:
        ConfigError: the keys are not exactly the hyperparameters of a known family, or a value is invalid.
    """
    fields = {key.removeprefix("model."): value for key, value in recipe.items() if key.startswith("model.")}
    kind = SPECS.get(str(fields.get("family")))
    names = [] if kind is None else [field.name for field in dataclasses.fields(kind)]
    if kind is None or sorted(names) != sorted(fields):
        raise ConfigError(f"not the hyperparameters of a known model family ({', '.join(FAMILIES)}): {fields}")
    if isinstance(fields.get("rope_scaling"), Mapping):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return kind(**fields)


def as_config_table(spec: ModelSpec) -> str:
    """The [model] table of a config for this spec: the named size with the fewest differences, and the differences."""
    candidates = {size: _overrides_to(spec, size) for size in SIZES[spec.family]}
    size, overrides = min(
        ((size, fields) for size, fields in candidates.items() if fields is not None), key=lambda pair: len(pair[1])
    )
    lines = ["[model]", f'family = "{spec.family}"', f'size = "{size}"']
    return "\n".join([*lines, *(f"{name} = {_as_toml(value)}" for name, value in overrides.items())])


def _overrides_to(spec: ModelSpec, size: str) -> dict[str, Any] | None:
    """The overrides that turn a named size into this spec; None if one of them is None, which TOML cannot express."""
    ours, named = (
        {name.removeprefix("model."): value for name, value in each.as_recipe().items()}
        for each in (spec, named_size(spec.family, size, 1))
    )
    wanted = {name: value for name, value in ours.items() if value != named[name]}
    if None in wanted.values():
        return None
    if {"width", "heads"} & set(wanted):  # unless set, mlp_width and head_width are derived from width and heads
        wanted |= {name: ours[name] for name in ("mlp_width", "head_width") if name in ours}
    return wanted


def _as_toml(value: Any) -> str:
    if isinstance(value, Mapping):  # rope_scaling, without the fields of the other kinds
        foreign = {name for kind, names in ROPE_SCALINGS.items() if kind != value["kind"] for name in names}
        own = {name: inner for name, inner in value.items() if name not in foreign}
        return "{ " + ", ".join(f"{name} = {_as_toml(inner)}" for name, inner in own.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _unknown(path: str, name: str, allowed: Collection[str]) -> str:
    hint = did_you_mean(name, allowed) or "."
    return f"{path}: unknown {path.rpartition('.')[2]} {name!r}{hint} Allowed: {', '.join(allowed)}"
