"""Reading TOML files: size and depth limits for untrusted files, and merging a file over those that it `extends`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from titan_cpt.config.references import tables_in
from titan_cpt.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LARGEST_BYTES = 1 << 20
_ENDLESS_KEY = re.compile(rb"(?:[\w\"' \t-]{1,40}\.){100}")  # tomllib's time grows with the square of such a key


class TomlFile(NamedTuple):
    """A file as it was read, before it is merged over the files that it extends."""

    path: Path
    text: str
    tables: dict[str, Any]


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        ValueError: the text is not valid TOML.
        RecursionError: tables or lists are nested too deeply.
    """
    return tomllib.loads(text)


def read_with_bases(path: Path, _seen: tuple[Path, ...] = (), *, files: list[TomlFile] | None = None) -> dict[str, Any]:
    """The tables of a file, merged over those of the files that it extends.

    Stages are merged by name; any other list replaces that of the base.

    Args:
        files: every file that was read is appended here, a base before the file that extends it.

    Raises:
        ConfigError: a file cannot be read, is not valid TOML, or extends itself.
    """
    here = Path(os.path.realpath(path))  # not resolve(): before Python 3.13 it raises RuntimeError for a loop of links
    if here in _seen:
        raise ConfigError(f"{path}: extends itself: {' -> '.join(p.name for p in (*_seen, here))}")
    raw, text = _read_toml(path)
    bases = raw.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and "\0" not in base for base in bases):
        raise ConfigError(f"{path}: extends: must be a file or a list of files, got {bases!r}")
    rebase_fetch_scripts(raw, path.parent, os.path.relpath)
    merged: dict[str, Any] = {}
    for base in bases:
        if not (path.parent / base).exists():
            raise ConfigError(f"{path}: extends: {path.parent / base}: no such file (relative to {path.name}'s folder)")
        merged = _merge(merged, read_with_bases(path.parent / base, (*_seen, here), files=files))
    if files is not None:
        files.append(TomlFile(path, text, raw))
    return _merge(merged, raw)


def _read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """The file's tables and its text."""
    try:
        if path.is_char_device() or path.is_fifo():
            raise ConfigError(f"{path}: is a device, which may never end. Give the path of a TOML file")
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
        if len(content) > _LARGEST_BYTES or _ENDLESS_KEY.search(content):
            raise ConfigError(f"{path}: not valid TOML: more than {_LARGEST_BYTES:,} bytes, or a key of 100 names")
        text = content.decode()
        raw = parse_toml(text)
        too_large = exceeds_64_bits(raw)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Give the path of a TOML file") from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, and integers of thousands of digits
        raise ConfigError(f"{path}: not valid TOML: {error}{_toml_hint(path, str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: tables or lists are nested too deeply") from None
    if too_large:
        raise ConfigError(f"{path}: not valid TOML: integers must fit into 64 bits")
    return raw, text


def _toml_hint(path: Path, problem: str) -> str:
    """The line with the error, and what to write instead for mistakes that are common."""
    other = {".yml": "YAML", ".yaml": "YAML", ".json": "JSON"}.get(path.suffix)
    if other is not None:
        return f"; it is {other}, and configs are TOML: `titan-cpt convert-config` converts those of other programs"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = re.search(r"at line (\d+)", problem)
    number = int(found[1]) if found else len(lines) if "end of document" in problem else 0
    if not 0 < number <= len(lines):
        return ""
    line = lines[number - 1].strip()
    shown = f": `{line[:100]}`"
    value = line.partition("=")[2].strip()
    if re.match(r"(True|False|None)\b", value):
        return f"{shown}; write true and false in lower case, and omit a key that has no value"
    if (line.count('"') % 2 or line.count("'") % 2) and re.match("Illegal character|Unterminated", problem):
        return f"{shown}; a closing quote is missing"
    if problem.startswith(("Cannot declare", "Cannot overwrite")):
        return f"{shown}; it is in the file twice: remove one"
    if problem.startswith("Invalid value") and re.match(r"[A-Za-z_/.]", value):
        return f"{shown}; text needs quotes"
    return shown


def exceeds_64_bits(value: Any) -> bool:
    """Whether a value contains an integer outside of 64 bits, the range that TOML guarantees."""
    if isinstance(value, dict | list):
        return any(exceeds_64_bits(inner) for inner in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def rebase_fetch_scripts(raw: dict[str, Any], folder: Path, to_path: Callable[[Path], str]) -> None:
    """Replace the path of each fetch script, which is relative to `folder`, by `to_path(folder / script)`, in place.

    A script is named relative to the TOML file that names it, so that it is found from any working directory.
    """
    for dataset in tables_in(raw.get("datasets")).values():
        source = dataset.get("source")
        if isinstance(source, dict) and isinstance(source.get("fetch"), str):
            source["fetch"] = to_path(folder / source["fetch"])


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if key == "stages" and isinstance(old, list) and isinstance(value, list):
            merged[key] = _merge_stages(old, value)
        elif isinstance(old, dict) and isinstance(value, dict) and not _has_other_schedule(old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _has_other_schedule(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether both are LR tables of different schedules, which have different keys: the new one replaces the old."""
    return "schedule" in new and new["schedule"] != old.get("schedule")


def _merge_stages(base: list[Any], over: list[Any]) -> list[Any]:
    merged = list(base)
    for stage in over:
        name = stage.get("name") if isinstance(stage, dict) else None
        same = [
            i for i, old in enumerate(merged) if isinstance(old, dict) and name is not None and old.get("name") == name
        ]
        if same:
            merged[same[0]] = _merge(merged[same[0]], stage)
        else:
            merged.append(stage)
    return merged
