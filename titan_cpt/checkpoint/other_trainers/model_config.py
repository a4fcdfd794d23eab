"""The model of another trainer's checkpoint from a config file: the trainer's own, or a TOML file with our [model]."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from titan_cpt.config.messages import error_message
from titan_cpt.config.model import ModelConfig
from titan_cpt.config.toml_files import read_with_bases
from titan_cpt.convert.convert import convert_files
from titan_cpt.errors import ConfigError
from titan_cpt.models.huggingface_keys import Keys
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import ModelSpec


def spec_of_trainer_config(path: Path, project: str, *, rows: int) -> ModelSpec:
    """The model that a config file describes.

    Args:
        path: a config of `project` that `titan-cpt convert-config` converts, or a TOML file with our [model].
        project: a name of `titan_cpt.convert`.
        rows: rows of the embedding in the checkpoint, which replace the config's vocabulary.

    Raises:
        ConfigError: the file cannot be read, or describes a model that is not available here.
    """
    if path.suffix == ".toml":
        model = read_with_bases(path).get("model")
        if isinstance(model, Mapping) and "family" in model:
            return spec_from_table(dict(model), path, rows=rows)
        if not isinstance(model, Mapping):  # a converter would take its own defaults for a model
            raise ConfigError(f"{path}: has no table [model], which must describe the model of the checkpoint")
    return spec_of_trainer_configs([path], project, rows=rows)


def spec_of_trainer_configs(paths: Sequence[Path], project: str, *, rows: int) -> ModelSpec:
    """The model that config files of another trainer describe together, as GPT-NeoX merges its files.

    Args:
        paths: configs of `project` that `titan-cpt convert-config` converts.
        project: a name of `titan_cpt.convert`.
        rows: rows of the embedding in the checkpoint, which replace the config's vocabulary.

    Raises:
        ConfigError: a file cannot be read, or they describe a model that is not available here.
    """
    conversion = convert_files(list(paths), project)
    if not conversion.same_architecture:
        lines = [entry.text for entry in (*conversion.unmatched, *conversion.decisions) if "architecture" in entry.text]
        raise ConfigError("\n  - ".join([f"{paths[0]}: describes a model that is not available here:", *lines]))
    table: dict[str, Any] = {}
    for key, value in conversion.values.items():
        if key.startswith("model."):
            *tables, last = key.removeprefix("model.").split(".")
            inner = table
            for name in tables:
                inner = inner.setdefault(name, {})
            inner[last] = value
    return spec_from_table(table, paths[0], rows=rows)


def spec_from_table(table: dict[str, Any], path: Path, *, rows: int) -> ModelSpec:
    """The model of our [model] table, with `rows` rows of the embedding.

    Args:
        path: the file, for messages.

    Raises:
        ConfigError: the table is wrong.
    """
    raw = {"model": {**table, "vocab_size": rows}}
    try:
        config = ModelConfig.model_validate(raw["model"])
    except ValidationError as error:
        faults = [error_message({**each, "loc": ("model", *each["loc"])}, raw) for each in error.errors()]
        raise ConfigError("\n".join([f"{path}:", *(f"  - {fault}" for fault in faults)])) from None
    overrides = config.model_dump(exclude={"family", "size", "options"}, exclude_none=True)
    try:
        return named_size(config.family, config.size, 1, overrides | (config.options or {}))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def require_keys_off(keys: Keys, names: Collection[str]) -> None:
    """Add a problem for each of these keys that is neither missing, null, false nor 0."""
    for name in names:
        if keys.table.get(name):
            keys.add_problem(name, f"is not available here, got {_shown(keys.table[name])}")


def refuse_unknown_keys(keys: Keys, known: Collection[str], version: str) -> None:
    """Add a problem for each key that is not known, unless it is off: a newer version may compute something else."""
    for name, value in keys.table.items():
        if name not in known and value:
            keys.add_problem(name, f"is not a key of {version}, which is read here, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
