"""The converted config as a commented TOML file, and the three lists as text in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from titan_cpt.convert.conversion import Conversion, ListedKeys, shown

_TABLES = (
    "job", "model", "tokenizer", "datasets", "optimizer", "training", "parallelism", "comm", "checkpoint",
    "activation_checkpoint", "compile", "float8", "metrics", "profiling", "validation", "evaluation",
)  # fmt: skip
_STAGE_KEYS = ("name", "dataset", "steps", "tokens", "global_batch_size", "init", "optimizer_state", "lr")
_WIDTH = 80


def toml_text(out: Conversion) -> str:
    """The file: a header, our tables with the other project's keys as comments, and what needs a look at the end."""
    files = ", ".join(path.name for path in out.files)
    lines = [
        f"# Converted by `titan-cpt convert-config` from {files} ({out.project}).",
        "# A comment behind a line names the keys that it comes from. What has no counterpart, and what to check,",
        "# is listed at the end of this file.",
    ]
    if not out.same_architecture:
        lines.insert(1, '# ATTENTION: the model below is another one: see "another architecture" at the end.')
    origins = {
        ours: finding for findings in (out.converted, out.decisions) for finding in findings for ours in finding.ours
    }
    for table in _TABLES:
        keys = [key for key in out.values if key.startswith(f"{table}.")]
        for inner, names in _by_table(keys).items():
            lines += ["", f"[{inner}]"]
            lines += [_line(name, out.values[f"{inner}.{name}"], origins.get(f"{inner}.{name}")) for name in names]
    lines += ["", "[[stages]]", 'name = "pretrain"']
    for name in _STAGE_KEYS:
        if f"stage.{name}" in out.values:
            lines.append(_line(name, out.values[f"stage.{name}"], origins.get(f"stage.{name}")))
    for title, findings in (("No counterpart here", out.unmatched), ("To check", out.decisions)):
        if findings:
            lines += ["", f"# {title}:"]
            lines += [f"# {line}".rstrip() for finding in findings for line in _entry(finding)]
    return "\n".join(lines) + "\n"


def report_text(out: Conversion) -> str:
    """The three lists in 80 columns."""
    lines: list[str] = []
    for title, findings in (
        ("converted", out.converted),
        ("no counterpart here", out.unmatched),
        ("to check", out.decisions),
    ):
        keys = sum(len(finding.found) for finding in findings)
        lines += ["", f"{title}: {keys} key{'s' * (keys != 1)}"]
        lines += [f"  {line}" for finding in findings for line in _entry(finding)]
    return "\n".join(lines[1:])


def _by_table(keys: Sequence[str]) -> dict[str, list[str]]:
    """Names of keys by their table; a table before the tables inside it."""
    tables: dict[str, list[str]] = {}
    for key in keys:
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(name)
    return dict(sorted(tables.items(), key=lambda item: (item[0].count("."), item[0])))


def _line(name: str, value: Any, origin: ListedKeys | None) -> str:
    text = f"{name} = {_inline(value)}"
    if origin is not None and origin.keys:
        comment = ", ".join(origin.keys) + (" (default there)" if not origin.found else "")
        text += f"  # {comment}"
    return text


def _inline(value: Any) -> str:
    """A TOML value in one line, also of a table."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_inline(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inline(inner) for inner in value) + "]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def _key(name: str) -> str:
    """A key of an inline table, in quotes unless it is bare and not a number: keys of a ramp are numbers of tokens."""
    return name if name.isidentifier() else f'"{name}"'


def _entry(finding: ListedKeys) -> list[str]:
    """A finding as lines: keys and values, what they became, and the explanation."""
    pairs = zip(finding.keys, finding.found, strict=True) if finding.found else ()
    head = ", ".join(f"{key} = {value}" for key, value in pairs) or ", ".join(finding.keys)
    ours = ", ".join(
        f"{key.replace('stage.', 'stages.pretrain.')} = {shown_ours(value)}" for key, value in finding.ours.items()
    )
    lines = []
    if head and ours and len(f"{head} -> {ours}") <= _WIDTH - 4:
        lines.append(f"{head} -> {ours}")
    else:
        lines += _wrapped(head, "", "    ") if head else []
        lines += _wrapped(ours, "  -> " if head else "", "     ") if ours else []
    if finding.text and (head or ours) and len(lines) == 1 and len(f"{lines[0]}: {finding.text}") <= _WIDTH - 4:
        return [f"{lines[0]}: {finding.text}"]
    indent = "    " if head or ours else ""
    return lines + (_wrapped(finding.text, indent, indent or "  ") if finding.text else [])


def shown_ours(value: Any) -> str:
    """A value of our config in a list."""
    return _inline(value) if isinstance(value, Mapping) else shown(value)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH - 4, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
