"""From files and command line to a Config: reading, `extends`, dotted overrides; every fault is told at once."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from titan_cpt.common.text import listed, nearest
from titan_cpt.config.messages import in_words, is_string, models_at, reference_faults, tables
from titan_cpt.config.schema import Config
from titan_cpt.config.source_location import Source, located
from titan_cpt.config.sweep import points, sweep_faults
from titan_cpt.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LARGEST_BYTES = 1 << 20
_ENDLESS_KEY = re.compile(rb"(?:[\w\"' \t-]{1,40}\.){100}")  # tomllib's time grows with the square of such a key


def load_config(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Read the file, what it extends and the overrides, and check all of it.

    Args:
        path: the TOML.
        overrides: dotted key and value text, as on the command line; later ones win.

    Raises:
        ConfigError: every fault found, each with its dotted key, what was found and what is allowed.
    """
    files: list[Source] = []
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
    raw: dict[str, Any], path: Path, overrides: Sequence[tuple[str, str]] = (), files: Sequence[Source] = ()
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
        faults += [in_words(one, raw) for one in error.errors() if not (one["type"] == "too_short" and one["input"])]
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
    _anchor_fetch_scripts(raw, Path(), os.path.abspath)
    return tomli_w.dumps(raw)


def read_with_bases(path: Path, _seen: tuple[Path, ...] = (), *, files: list[Source] | None = None) -> dict[str, Any]:
    """The file's tables laid over those that it extends; stages are merged by name, other lists replaced.

    Args:
        files: gets every file that was read, those that lie below others first.
    """
    here = Path(os.path.realpath(path))  # not resolve(), to which a loop of links is a RuntimeError before Python 3.13
    if here in _seen:
        raise ConfigError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in (*_seen, here))}")
    raw, text = _read_toml(path)
    bases = raw.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and "\0" not in base for base in bases):
        raise ConfigError(f"{path}: extends: must be a file or a list of files, got {bases!r}")
    _anchor_fetch_scripts(raw, path.parent, os.path.relpath)
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, read_with_bases(path.parent / base, (*_seen, here), files=files))
    if files is not None:
        files.append(Source(path, text, raw))
    return _merge(merged, raw)


def _read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """The file's tables and its text."""
    try:
        if path.is_char_device() or path.is_fifo():
            raise ConfigError(f"{path}: is a device, which may never end. Give --config the path of a TOML file")
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
        if len(content) > _LARGEST_BYTES or _ENDLESS_KEY.search(content):
            raise ConfigError(f"{path}: not valid TOML: more than {_LARGEST_BYTES:,} bytes, or a key of 100 names")
        text = content.decode()
        raw = tomllib.loads(text)
        beyond = _beyond_64_bits(raw)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Give --config the path of a TOML file") from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, and integers of thousands of digits
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: tables or lists are nested too deeply") from None
    if beyond:
        raise ConfigError(f"{path}: not valid TOML: integers must fit into 64 bits")
    return raw, text


def _beyond_64_bits(value: Any) -> bool:
    """Whether an integer in there is larger than TOML allows and arithmetic here expects."""
    if isinstance(value, dict | list):
        return any(_beyond_64_bits(inner) for inner in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def _anchor_fetch_scripts(raw: dict[str, Any], folder: Path, written: Callable[[Path], str]) -> None:
    """A fetch script is named relative to the file that names it, so that it is found from any working directory."""
    for dataset in tables(raw.get("datasets")).values():
        source = dataset.get("source")
        if isinstance(source, dict) and isinstance(source.get("fetch"), str):
            source["fetch"] = written(folder / source["fetch"])


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if key == "stages" and isinstance(old, list) and isinstance(value, list):
            merged[key] = _merge_stages(old, value)
        elif isinstance(old, dict) and isinstance(value, dict) and not _is_choice(old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _is_choice(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """An LR table with another schedule replaces the base's whole: its keys mean something else."""
    return "schedule" in new and new["schedule"] != old.get("schedule")


def _merge_stages(base: list[Any], over: list[Any]) -> list[Any]:
    merged = list(base)
    for stage in over:
        name = stage.get("name") if isinstance(stage, dict) else None
        places = [
            i for i, old in enumerate(merged) if isinstance(old, dict) and name is not None and old.get("name") == name
        ]
        if places:
            merged[places[0]] = _merge(merged[places[0]], stage)
        else:
            merged.append(stage)
    return merged


# Overrides


def set_key(raw: dict[str, Any], dotted: str, value: Any = None, *, text: str | None = None) -> Iterator[str]:
    """Set one dotted key in place, stages by name; yields a fault instead where the path leads nowhere.

    Args:
        value: what the key gets.
        text: in the value's place what the command line says, read as the key's type asks.
    """
    parts = dotted.split(".")
    where = f"sweep.{dotted}" if text is None else f"--{dotted}"
    place: Any = raw
    for depth, part in enumerate(parts[:-1]):
        if isinstance(place, list):
            found = [stage for stage in place if isinstance(stage, dict) and stage.get("name") == part]
            if not found:
                known = [str(stage.get("name")) for stage in place if isinstance(stage, dict)]
                yield f"{where}: there is no stage {part!r}{nearest(part, known)}; stages are {listed(known)}"
                return
            place = found[0]
        elif isinstance(place, dict):
            place = place.setdefault(part, [] if depth == 0 and part == "stages" else {})
        else:
            yield f"{where}: {'.'.join(parts[:depth])} is a value, not a table"
            return
    if isinstance(place, list):
        yield f"{where}: is not a key; a stage's key is written stages.NAME.KEY"
    elif not isinstance(place, dict):
        yield f"{where}: {'.'.join(parts[:-1])} is a value, not a table"
    else:
        value = value if text is None else _value(parts, text)
        if _beyond_64_bits(value):
            yield f"{where}: integers must fit into 64 bits"
        else:
            place[parts[-1]] = value


def _value(parts: Sequence[str], text: str) -> Any:
    """The override's text as TOML reads it; a bare word, and whatever a string key is given, is a string."""
    if any(is_string(model, parts[-1]) for model in models_at(parts[:-1])):
        return text
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return read["value"] if len(read) == 1 else text
