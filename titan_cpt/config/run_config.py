"""The config.toml in a run's folder (its resolved config), and protection of a user's files in that folder.

A run writes config.toml, plan.json, summary.json, metrics.jsonl and .lock. It replaces or extends such a file only
if its content shows that a run wrote it: a user's own folder may have the name of a run, or a file such as config.toml.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.reading import read_text
from titan_cpt.common.recipe import differences
from titan_cpt.common.run_folder import CONFIG_FILE, LOCK_FILE, METRICS_FILE, PLAN_FILE, SUMMARY_FILE, UPLOADS_FILE
from titan_cpt.config.load import check_config, dump_config
from titan_cpt.config.schema import Config
from titan_cpt.config.toml_files import parse_toml
from titan_cpt.errors import CheckpointError, ConfigError

_METRICS_BEGIN = '{"kind": "'
_LINES_CHECKED = 100
_ALWAYS_WRITTEN = {"job": "output_dir", "training": "gc_freq", "checkpoint": "keep_latest_k", "validation": "interval"}


def require_own_run(folder: Path, config: Config) -> None:
    """Check that training in this folder would replace only files that a run wrote.

    Raises:
        CheckpointError: lists every file that no run wrote.
        AccessError: a file cannot be read.
    """
    tests: dict[str, Callable[[str], bool]] = {
        CONFIG_FILE: lambda text: _is_resolved_config(text, config),
        PLAN_FILE: lambda text: _has_keys(text, "fingerprint", "stages"),
        SUMMARY_FILE: lambda text: _has_keys(text, "stages"),
        UPLOADS_FILE: lambda text: _has_keys(text, "owner", "to", "uploaded"),
        LOCK_FILE: lambda text: not text or text.startswith('{"pid": '),
        METRICS_FILE: _is_metrics,
    }
    foreign = [folder / name for name, is_own in tests.items() if not _is_own(folder / name, is_own)]
    if foreign:
        raise _foreign(foreign)


def write_run_config(path: Path, config: Config) -> bool:
    """Write the resolved config; a file with the same settings is not touched and keeps its comments.

    Returns:
        Whether it was written.

    Raises:
        CheckpointError: the path is a file that no run wrote.
    """
    text = dump_config(config)
    if not _is_own(path, lambda content: _is_resolved_config(content, config)):
        raise _foreign([path])
    with suppress(FileNotFoundError):
        if parse_toml(read_text(path)) == parse_toml(text):
            return False
    write_text_atomically(path, text)
    return True


def last_setting(path: Path, table: str, key: str) -> Any:
    """The value of `table.key` in the config.toml of a run's last start; None if it has no such key or file."""
    try:
        return parse_toml(read_text(path)).get(table, {}).get(key)
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def changed_settings(path: Path, config: Config) -> list[str]:
    """`key: old -> new` for every setting in which a run's config.toml differs from the config that it resumes with.

    The run's name, description and folder are not compared; a stage that only one of the two has appears as a change
    of `stages`. Empty if the file is missing or is not a config that this version reads.
    """
    try:
        old = check_config(parse_toml(read_text(path)), path)
    except (FileNotFoundError, ValueError, RecursionError, ConfigError):
        return []
    before = _settings(old)
    now = _settings(check_config(parse_toml(dump_config(config)), path))  # as written: paths of scripts are absolute
    both = {stage.name for stage in old.stages} & {stage.name for stage in config.stages}
    return [
        line for line in differences(before, now) if not line.startswith("stages.") or line.split(".", 2)[1] in both
    ]


def settings_that_are_not_defaults(config: Config) -> list[str]:
    """`key = value` for every setting of a config that differs from its default, stages by their names."""
    raw: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    raw["stages"] = {stage["name"]: stage for stage in raw.get("stages", [])}
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in _flat(raw)]


def _settings(config: Config) -> dict[str, Any]:
    """{dotted key: value} of every setting, with stages by their names."""
    raw: dict[str, Any] = config.model_dump(
        mode="json", by_alias=True, exclude={"job": {"name", "output_dir", "description"}}
    )
    raw["stages"] = {stage["name"]: stage for stage in raw["stages"]}
    return {**dict(_flat(raw)), "stages": list(raw["stages"])}


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif value is not None:
            yield before + key, value


def _foreign(paths: Sequence[Path]) -> CheckpointError:
    was, it = ("was", "it") if len(paths) == 1 else ("were", "them")
    return CheckpointError(
        f"{', '.join(map(str, paths))}: {was} not written by a run, and this run would replace {it}. Nothing was "
        f"changed: rename or move {it}, or choose another job.name or job.output_dir"
    )


def _is_own(path: Path, is_own: Callable[[str], bool]) -> bool:
    try:
        return is_own(read_text(path))
    except FileNotFoundError:
        return True
    except (ValueError, RecursionError):
        return not os.path.lexists(path)  # an impossible name, such as one too long: writing the file reports it


def _is_resolved_config(text: str, config: Config) -> bool:
    """Whether `dump_config` wrote this TOML, or it has the same settings.

    `dump_config` writes every default and no comments. job.name may differ: a user can copy a run's folder and train
    the copy under the name of its folder.
    """
    raw: dict[str, Any] = parse_toml(text)
    if raw == parse_toml(dump_config(config)):
        return True
    commented = any(line.lstrip().startswith("#") for line in text.splitlines())
    full = all(isinstance(raw.get(table), dict) and key in raw[table] for table, key in _ALWAYS_WRITTEN.items())
    return full and not commented


def _is_metrics(text: str) -> bool:
    """Whether a text is a metrics.jsonl, possibly with damaged lines or with an incomplete first line after a kill."""
    if "\n" not in text:
        return _METRICS_BEGIN.startswith(text[: len(_METRICS_BEGIN)])
    return any(line.startswith(_METRICS_BEGIN) for line in text.split("\n", _LINES_CHECKED)[:_LINES_CHECKED])


def _has_keys(text: str, *keys: str) -> bool:
    record = json.loads(text)
    return isinstance(record, dict) and all(key in record for key in keys)
