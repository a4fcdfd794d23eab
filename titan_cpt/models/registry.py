"""The model families and their named sizes. Does not import torch, because the training plan uses it.

To add a family to titan_cpt: write a folder titan_cpt/models/<family> with model.py, spec.py, parallelize.py and
huggingface.py, and add its name to `OWN_FAMILIES` in titan_cpt/config/model.py. Another package registers a family as
an entry point `titan_cpt.families` that names its package of these modules (docs/library.md).
"""

import dataclasses
import importlib.util
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from titan_cpt.common.plugins import FAMILIES as PLUGIN_GROUP
from titan_cpt.common.plugins import Plugin, find_plugin, registered, what_is_registered
from titan_cpt.common.text import did_you_mean
from titan_cpt.config.model import OWN_FAMILIES, ModelConfig
from titan_cpt.errors import ConfigError
from titan_cpt.models.spec import RECORDED_IF_SET, ROPE_SCALINGS, ModelSpec, RopeScaling

FAMILIES: tuple[str, ...] = OWN_FAMILIES
"""Names of titan_cpt's own families, which are the folders in titan_cpt/models."""

_NEEDED_FOR = {  # optional modules of a registered family
    "parallelize": "tensor parallelism",
    "huggingface": 'import, export and init = "hf:..."',
}

VOCABULARY_MULTIPLE = 128
"""The vocabulary size is padded to a multiple of this number."""


def family_module(family: str, name: str) -> ModuleType:
    """Import titan_cpt/models/<family>/<name>.py. `model` and `parallelize` import torch; `spec`, `huggingface` do not.

    Raises:
        ConfigError: the family is unknown, or is of another package and lacks this module.
    """
    if family in FAMILIES:
        return importlib.import_module(f"titan_cpt.models.{family}.{name}")
    plugin = registered_family(family)
    module = f"{plugin.entry.module}.{name}"
    plugin.load()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise ConfigError(f"model.family: {family!r} of {plugin.origin}: {error}") from error
        need = f", which is needed for {_NEEDED_FOR[name]}" if name in _NEEDED_FOR else ""
        raise ConfigError(f"model.family: {family!r} of {plugin.origin} has no module {module}{need}") from None


def has_family_module(family: str, name: str) -> bool:
    """Whether the family has the module; does not import it.

    Raises:
        ConfigError: the family is unknown, or its package cannot be imported.
    """
    if family in FAMILIES:
        return True
    plugin = registered_family(family)
    plugin.load()
    return importlib.util.find_spec(f"{plugin.entry.module}.{name}") is not None


def registered_family(family: str) -> Plugin:
    """The package that registers a family.

    Raises:
        ConfigError: the family is unknown.
    """
    if family not in registered(PLUGIN_GROUP):
        raise ConfigError(f"{_unknown('model.family', family, FAMILIES)}; {what_is_registered(PLUGIN_GROUP)}")
    return find_plugin(PLUGIN_GROUP, family)


def family_names() -> tuple[str, ...]:
    """titan_cpt's own families, then those that other packages register."""
    return FAMILIES + tuple(name for name in registered(PLUGIN_GROUP) if name not in FAMILIES)


def spec_class(family: str) -> type[ModelSpec]:
    """The family's spec class.

    Raises:
        ConfigError: the family is unknown, or its package has no spec.
    """
    if family in SPECS:
        return SPECS[family]
    kind: type[ModelSpec] = family_module(family, "spec").SPEC
    return kind


SPECS: Mapping[str, type[ModelSpec]] = {family: family_module(family, "spec").SPEC for family in FAMILIES}
"""The spec class of each of titan_cpt's families; `spec_class` also has those of other packages."""

SIZES: Mapping[str, tuple[str, ...]] = {family: spec.sizes() for family, spec in SPECS.items()}
"""The named sizes of each of titan_cpt's families."""


def named_size(family: str, size: str, tokenizer_vocab: int, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The spec of a named size for a tokenizer.

    The vocabulary size is that of the tokenizer or of the released model, whichever is larger, padded to a multiple of
    `VOCABULARY_MULTIPLE`. An overridden `vocab_size` is not padded.

    Args:
        family: one of `family_names()`.
        size: one of the family's sizes.
        tokenizer_vocab: number of token ids of the tokenizer.
        overrides: fields of the family's spec, by name, that replace those of the size.

    Raises:
        ConfigError: the family, the size or an overridden field is unknown; the spec is invalid; or an overridden
            `vocab_size` is smaller than the tokenizer's.
    """
    overrides = dict(overrides or {})
    kind = spec_class(family)
    if size not in kind.sizes():
        raise ConfigError(_unknown("model.size", size, kind.sizes()))
    fields = [field.name for field in dataclasses.fields(kind) if field.name != "family"]
    foreign = [name for name in overrides if name not in fields]
    problems = [f"model.{name}: {_not_a_key_of(family, name, fields)}" for name in foreign]
    if problems:
        raise ConfigError("\n".join(problems))
    if isinstance(scaling := overrides.get("rope_scaling"), Mapping):
        overrides["rope_scaling"] = RopeScaling(**scaling)

    released_vocab, chosen = kind.size_fields(size, overrides)
    vocab_size = round_up(max(released_vocab or 0, tokenizer_vocab), VOCABULARY_MULTIPLE)
    values = {"family": family, "vocab_size": vocab_size, **chosen, **overrides}
    if missing := [name for name in _required_fields(kind) if name not in values]:
        raise ConfigError("\n".join(f"model.{name}: is missing; size {size!r} does not set it" for name in missing))
    spec = kind(**values)
    if spec.vocab_size < tokenizer_vocab:
        raise ConfigError(
            f"model.vocab_size: must be at least {tokenizer_vocab:,}, the number of tokens of the tokenizer, got "
            f"{spec.vocab_size:,}; remove it to get {vocab_size:,}"
        )
    return spec


def _required_fields(kind: type[ModelSpec]) -> list[str]:
    unset = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.init and field.default is unset and field.default_factory is unset
    ]


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def spec_from_recipe(recipe: Mapping[str, Any]) -> ModelSpec:
    """The spec from the `model.*` keys of a run's recipe, as `ModelSpec.as_recipe` writes them.

    Raises:
        ConfigError: the keys are not exactly the hyperparameters of a known family, or a value is invalid.
    """
    fields = {key.removeprefix("model."): value for key, value in recipe.items() if key.startswith("model.")}
    family = str(fields.get("family"))
    if (origin := recipe.get("plugins.model.family")) and family not in family_names():
        raise ConfigError(f"model.family: {family!r} was registered by {origin}, which is not installed: install it")
    kind = spec_class(family) if family in family_names() else None
    known = () if kind is None else dataclasses.fields(kind)
    names = {field.name for field in known}
    required = {field.name for field in known if field.metadata != RECORDED_IF_SET}
    if kind is None or not required <= fields.keys() <= names:
        raise ConfigError(f"not the hyperparameters of a known model family ({', '.join(family_names())}): {fields}")
    if isinstance(fields.get("rope_scaling"), Mapping):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return kind(**fields)


def as_config_table(spec: ModelSpec) -> str:
    """The [model] table of a config for this spec: the named size with the fewest differences, and the differences."""
    candidates = {size: _overrides_to(spec, size) for size in spec_class(spec.family).sizes()}
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
    wanted = {name: value for name, value in ours.items() if value != named.get(name)}
    if None in wanted.values():
        return None
    if {"width", "heads"} & set(wanted):  # unless set, mlp_width and head_width are derived from width and heads
        wanted |= {name: ours[name] for name in ("mlp_width", "head_width") if name in ours}
    return wanted


def _as_toml(value: Any) -> str:
    if isinstance(value, Mapping):  # rope_scaling, without the fields of the other kinds
        foreign = {name for kind, names in ROPE_SCALINGS.items() if kind != value["kind"] for name in names}
        own = {name: inner for name, inner in value.items() if name not in foreign and inner is not None}
        return "{ " + ", ".join(f"{name} = {_as_toml(inner)}" for name, inner in own.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _not_a_key_of(family: str, name: str, fields: Collection[str]) -> str:
    """Another family may have it: then a key of this one that reads alike would be no help."""
    known = name in ModelConfig.model_fields
    hint = ": leave it out." if known else did_you_mean(name, fields) or "."
    return f"the family {family!r} has no such hyperparameter{hint} It has: {', '.join(fields)}"


def _unknown(path: str, name: str, allowed: Collection[str]) -> str:
    hint = did_you_mean(name, allowed) or "."
    return f"{path}: unknown {path.rpartition('.')[2]} {name!r}{hint} Allowed: {', '.join(allowed)}"
