"""Loading a config from TOML files and command-line overrides. An error lists every problem that was found."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from titan_cpt.common.text import quoted_list
from titan_cpt.config.messages import error_message
from titan_cpt.config.overrides import set_key
from titan_cpt.config.references import reference_faults
from titan_cpt.config.schema import Config
from titan_cpt.config.source_location import with_location
from titan_cpt.config.sweep import FIT, SweepFitConfig, points, sweep_faults
from titan_cpt.config.toml_files import TomlFile, read_with_bases, rebase_fetch_scripts
from titan_cpt.errors import ConfigError


def load_config(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Read a TOML file and the files it extends, apply the overrides, and validate the result.

    Args:
        path: the TOML file.
        overrides: (dotted key, text of the value) from the command line; a later one wins.

    Raises:
        ConfigError: lists every problem, with its dotted key, the value found and the values allowed.
    """
    files: list[TomlFile] = []
    return check_config(read_with_bases(path, files=files), path, overrides, files)


def load_run(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """`load_config` for a file that describes one run and not a sweep.

    Raises:
        ConfigError: as `load_config`, or the file has a [sweep].
    """
    config = load_config(path, overrides)
    if config.sweep:
        count = len(points(config.sweep))
        raise ConfigError(
            f"{path}: sweep: this file describes {count} sweep runs: `titan-cpt sweep {path}` trains them, and with "
            "--dry-run lists them"
        )
    return config


def config_from(source: Path | Mapping[str, Any], values: Mapping[str, Any]) -> Config:
    """`load_config` for Python: from a file or from tables, with overrides that are values and not their text.

    Args:
        source: the TOML file, or its tables as dictionaries; these are not changed.
        values: dotted key -> value.

    Raises:
        ConfigError: as `load_config`.
    """
    files: list[TomlFile] = []
    if isinstance(source, Path):
        raw, name = read_with_bases(source, files=files), source
    else:
        raw, name = _as_toml_tables(source), Path("config")
    faults = [fault for key, value in values.items() for fault in set_key(raw, key, _as_toml_tables(value), prefix="")]
    if faults:
        raise ConfigError("\n".join([f"{name}: overrides:", *(f"  - {fault}" for fault in faults)]))
    return check_config(raw, name, files=() if values else files)


def _as_toml_tables(value: Any) -> Any:
    """A copy with the types that a TOML file gives: dictionaries, lists, strings."""
    if isinstance(value, Mapping):
        return {str(key): _as_toml_tables(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_toml_tables(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def check_config(
    raw: dict[str, Any], path: Path, overrides: Sequence[tuple[str, str]] = (), files: Sequence[TomlFile] = ()
) -> Config:
    """Apply overrides to a file's tables, in place, and validate them.

    Args:
        path: the file to name in error messages.
        files: the files that the tables were read from; an error then names file and line.

    Raises:
        ConfigError: lists every problem.
    """
    faults = [fault for key, text in overrides for fault in set_key(raw, key, text=text)]
    config = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        details = [each for each in error.errors() if not (each["type"] == "too_short" and each["input"])]
        faults += [error_message(each, raw) for each in details]
    faults += reference_faults(raw)
    if config is not None:
        faults += [*sweep_faults(config.sweep), *_fit_faults(raw, config)]
    if config is None or faults:
        overridden = (*(key for key, _ in overrides), "--")
        lines = [fault if fault.startswith(overridden) else with_location(fault, files) for fault in faults]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError("\n".join([f"{path}: {count}", *(f"  - {line}" for line in lines)]))
    return config


def _fit_faults(raw: dict[str, Any], config: Config) -> Iterator[str]:
    """The faults of [sweep.fit], if there is one: of its keys, and names that are not datasets."""
    if FIT not in config.sweep:
        return
    try:
        fit = SweepFitConfig.model_validate(config.sweep[FIT])
    except ValidationError as error:
        yield from (error_message({**each, "loc": ("sweep", FIT, *each["loc"])}, raw) for each in error.errors())
        return
    for key, names in (("objective", fit.weights), ("limit", fit.limit)):
        for name in names:
            if name.partition(".")[0] not in config.datasets:
                known = quoted_list(config.datasets)
                yield f"sweep.{FIT}.{key}: there is no [datasets.{name}]; there are {known}"
    if fit.law == "cmr" and not fit.limit:
        yield f'sweep.{FIT}.limit: is missing; law = "cmr" needs it, such as {{ pile = 0.05 }}'


def dump_config(config: Config) -> str:
    """The resolved config as TOML, with every default written out, without `extends`, and independent of its folder."""
    raw = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    rebase_fetch_scripts(raw, Path(), os.path.abspath)
    return tomli_w.dumps(raw)
