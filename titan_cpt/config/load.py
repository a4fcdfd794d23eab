"""From files and command line to a Config: reading, `extends`, dotted overrides; every fault is told at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from titan_cpt.config.messages import error_message
from titan_cpt.config.overrides import set_key
from titan_cpt.config.references import reference_faults
from titan_cpt.config.schema import Config
from titan_cpt.config.source_location import located
from titan_cpt.config.sweep import points, sweep_faults
from titan_cpt.config.toml_files import TomlFile, anchor_fetch_scripts, read_with_bases
from titan_cpt.errors import ConfigError


def load_config(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Read the file, what it extends and the overrides, and check all of it.

    Args:
        path: the TOML.
        overrides: dotted key and value text, as on the command line; later ones win.

    Raises:
        ConfigError: every fault found, each with its dotted key, what was found and what is allowed.
    """
    files: list[TomlFile] = []
    return check_config(read_with_bases(path, files=files), path, overrides, files)


def load_run(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """As `load_config`, of a file that is one run and not a sweep of several.

    Raises:
        ConfigError: as `load_config`, or the file has a [sweep].
    """
    config = load_config(path, overrides)
    if config.sweep:
        count = len(points(config.sweep))
        raise ConfigError(
            f"{path}: sweep: this file describes {count} runs; `titan-cpt sweep {path}` trains them, and with --plan "
            "shows what they come to"
        )
    return config


def check_config(
    raw: dict[str, Any], path: Path, overrides: Sequence[tuple[str, str]] = (), files: Sequence[TomlFile] = ()
) -> Config:
    """A file's tables as a Config, after the overrides, which are written into them; faults are told under `path`.

    Args:
        files: those that the tables were read from; a fault then names its file and line.

    Raises:
        ConfigError: every fault found, as `load_config` tells them.
    """
    faults = [fault for key, text in overrides for fault in set_key(raw, key, text=text)]
    overridden = tuple(key for key, _ in overrides)

    def error_of(faults: Sequence[str]) -> ConfigError:
        told = [fault if fault.startswith((*overridden, "--")) else located(fault, files) for fault in faults]
        return _config_error(path, told)

    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        errors = [one for one in error.errors() if not (one["type"] == "too_short" and one["input"])]
        faults += [error_message(one, raw) for one in errors]
        faults += list(reference_faults(raw))
        raise error_of(faults) from None
    faults += list(reference_faults(raw))
    faults += list(sweep_faults(config.sweep))
    if faults:
        raise error_of(faults)
    return config


def _config_error(path: Path, faults: Sequence[str]) -> ConfigError:
    count = "1 problem" if len(faults) == 1 else f"{len(faults)} problems"
    return ConfigError("\n".join([f"{path}: {count}", *(f"  - {fault}" for fault in faults)]))


def dump_config(config: Config) -> str:
    """The resolved config as TOML: every default spelt out, nothing left to `extends`, good in any folder."""
    raw = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    anchor_fetch_scripts(raw, Path(), os.path.abspath)
    return tomli_w.dumps(raw)


# Overrides
