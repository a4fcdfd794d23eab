"""Reads the files of other projects, and recognizes whose they are. A file is untrusted: size and depth are limited."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from titan_cpt.common.reading import read_text
from titan_cpt.config.toml_files import parse_toml
from titan_cpt.convert.conversion import flattened
from titan_cpt.errors import ConfigError

PROJECTS = ("torchtitan", "gpt-neox", "litgpt", "megatron")
_LARGEST_BYTES = 1 << 18
_MOST_VALUES = 100_000
_MOST_LISTS = 3000
_LITGPT = {"model_name", "model_config", "checkpoint_dir", "out_dir", "train", "eval", "initial_checkpoint_dir"}
_TORCHTITAN = {
    *("lr_scheduler", "training", "parallelism", "activation_checkpoint", "quantize", "job", "model", "comm"),
    *("experimental", "optimizer", "checkpoint", "metrics", "profiling", "compile", "float8", "validation", "debug"),
}
_NEOX = {
    "num_layers",
    "hidden_size",
    "pipe_parallel_size",
    "model_parallel_size",
    "data_path",
    "train_iters",
    "vocab_file",
}


def read_files(paths: Sequence[Path], project: str | None) -> tuple[str, dict[str, Any]]:
    """The project that the files belong to, and their keys, dotted.

    Args:
        project: one of `PROJECTS`; None: it is recognized from the content.

    Raises:
        ConfigError: a file cannot be read or parsed, or the project is not recognized; or there are several files, and
            their project reads one.
    """
    texts = [_text(path) for path in paths]
    project = project or _recognized(paths[0], texts[0])
    if len(paths) > 1 and project != "gpt-neox":
        raise ConfigError(
            f"{paths[1]}: {project} reads one config file, got {len(paths)}; give the name of the output last"
        )
    if project == "gpt-neox":
        return project, _merged(paths, texts)
    tables = {"torchtitan": _toml, "litgpt": _yaml, "megatron": _arguments}[project](paths[0], texts[0])
    return project, _flat(paths[0], tables)


def _text(path: Path) -> str:
    if path.is_dir() or not path.exists():
        raise ConfigError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a config file")
    if path.stat().st_size > _LARGEST_BYTES:
        raise ConfigError(f"{path}: is larger than {_LARGEST_BYTES:,} bytes; give a config file")
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file ({error}); give a config file") from None


def _recognized(path: Path, text: str) -> str:
    if path.suffix == ".toml":
        tables = _toml(path, text)
        if isinstance(tables.get("stages"), list) or "datasets" in tables:
            raise ConfigError(f"{path}: is a config of titan_cpt already; `titan-cpt plan {path}` shows what it plans")
        if tables.keys() & _TORCHTITAN:
            return "torchtitan"
    if path.suffix in (".yml", ".yaml", ".json"):
        keys = {str(key).replace("-", "_") for key in _yaml(path, text)}
        if len(keys & _LITGPT) >= 2 and not keys & {"num_layers", "pipe_parallel_size"}:
            return "litgpt"
        if keys & _NEOX:
            return "gpt-neox"
    elif re.search(r"(^|\s)--[a-z][a-z-]+", text):
        return "megatron"
    raise ConfigError(f"{path}: not recognized as a config of {', '.join(PROJECTS)}; say which with --from")


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return parse_toml(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error or 'nested too deeply'}") from None


def _yaml(path: Path, text: str) -> dict[str, Any]:
    """The keys of a YAML file, also of GPT-NeoX's, which are JSON with comments and trailing commas."""
    if text.count("[") + text.count("{") > _MOST_LISTS:  # PyYAML's time grows with the square of their depth
        raise ConfigError(f"{path}: not a config: has more than {_MOST_LISTS:,} lists and tables in brackets")
    try:
        tables = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    if not isinstance(tables, dict):
        raise ConfigError(f"{path}: must be a table of keys and values, got {type(tables).__name__}")
    if not _is_small(tables):
        raise ConfigError(f"{path}: has more than {_MOST_VALUES:,} values, counting what its anchors repeat")
    return tables


def _is_small(tables: dict[str, Any]) -> bool:
    """Whether there are few values, each counted as often as an anchor repeats it; a list in itself has no end."""
    waiting: list[Any] = [tables]
    for _ in range(_MOST_VALUES):
        if not waiting:
            return True
        value = waiting.pop()
        waiting += list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return False


def _merged(paths: Sequence[Path], texts: Sequence[str]) -> dict[str, Any]:
    """Files merged as GPT-NeoX's launcher does: "-" in keys is "_", and a key in two files is an error."""
    merged: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for path, text in zip(paths, texts, strict=True):
        for key, value in _yaml(path, text).items():
            name = str(key).replace("-", "_")
            if name in merged:
                where = f"{origin[name]} and {path}" if origin[name] != path else f"{path} twice"
                raise ConfigError(f"{name} is in {where}; GPT-NeoX refuses that too: remove one of them")
            merged[name] = value
            origin[name] = path
    return _flat(paths[0], merged)


def _flat(path: Path, tables: dict[str, Any]) -> dict[str, Any]:
    try:
        return flattened(tables)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; keep one of them") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None


def _arguments(path: Path, text: str) -> dict[str, Any]:
    """Megatron-LM's arguments in a shell script or in a list: name -> value, a list of values, or True for a flag.

    Variables that the script sets to plain values are replaced; a script is not run. An argument that is given twice
    has its last value, as in argparse. torchrun's own arguments are kept, because they give the number of ranks.
    """
    variables: dict[str, str] = {}
    words: list[str] = []
    for line in text.replace("\\\n", " ").splitlines():
        found = _words(line)
        if assignment := re.fullmatch(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(?!\()(.*)", line.split(" #")[0].rstrip()):
            variables[assignment[1]] = _value_of(assignment[2].strip(), variables)
            found = _words(assignment[2]) if "--" in assignment[2] else []
        words += [word for each in found for word in each.split()]
    return _named([_value_of(re.sub(r"^[A-Z_]+\+?=\(|\)$", "", word), variables) for word in words])


def _words(line: str) -> list[str]:
    """The words of a line of shell, without its comment."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quotation mark that another line closes
        return line.split("#")[0].split()


def _value_of(text: str, variables: dict[str, str]) -> str:
    text = text.strip("\"'")
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: variables.get(m[1], m[2]), text)
    text = re.sub(r"\$\{(\w+)\}|\$([A-Za-z_]\w*)", lambda m: variables.get(m[1] or m[2], m[0]), text)
    product = re.fullmatch(r"\$\(\(\s*(\d+)\s*\*\s*(\d+)\s*\)\)", text)
    return str(int(product[1]) * int(product[2])) if product else text


def _named(words: Sequence[str]) -> dict[str, Any]:
    arguments: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            name, equals, value = word.removeprefix("--").partition("=")
            current = arguments[name] = [value] if equals else []
        elif current is not None and word and not re.search(r"\[[@*]\]|\.py$|^[)&|>;]|^(fi|done|else)$", word):
            current.append(word)
        else:
            current = None
    return {name: True if not found else found[0] if len(found) == 1 else found for name, found in arguments.items()}
