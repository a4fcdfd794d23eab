"""Read and check the keys of a config.json; problems are collected by key. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

REQUIRED = object()
_LARGEST = 2**31 - 1  # far above any hyperparameter


class Keys:
    """Reads keys of a JSON object and collects problems.

    Attributes:
        problems: one line per missing or wrong key.
        defaulted: missing keys for which a default was used, as `key = value`.
    """

    def __init__(self, table: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> None:
        """Read from `table`, with `defaults` for optional keys; `prefix` is put before each key in messages."""
        self.table = table
        self.defaults = defaults
        self.prefix = prefix
        self.problems = list[str]()
        self.defaulted = list[str]()

    def value(self, key: str) -> Any:
        """The value in the file, or the default; REQUIRED if there is neither."""
        if key in self.table:
            return self.table[key]
        if key in self.defaults and self.defaults[key] is not None:
            self.defaulted.append(f"{key} = {self.defaults[key]!r}")
        return self.defaults.get(key, REQUIRED)

    def number(self, kind: type, key: str, *, null: Any = REQUIRED) -> Any:
        """A key's value as an int or a float. If it is wrong, adds a problem and returns 1, so that reading continues.

        Args:
            kind: int or float.
            key: its name.
            null: the result if the value, or the default, is null (None). If not given, null is a problem.
        """
        found = self.value(key)
        if found is None and null is not REQUIRED:
            return null
        if _fits(found, kind):
            return kind(found)
        absent = found is REQUIRED or (found is None and key not in self.defaults)
        fraction = ", not a whole one" if kind is int and _fits(found, float) else ""
        self.add_problem(key, "is missing" if absent else f"must be a number, got {_shown(found)}{fraction}")
        return kind(1)

    def flag(self, key: str) -> bool:
        """A key's value as a bool. If it is wrong, adds a problem and returns False."""
        found = self.value(key)
        if not isinstance(found, bool):
            self.add_problem(key, "is missing" if found is REQUIRED else f"must be true or false, got {_shown(found)}")
        return found is True

    def only(self, key: str, allowed: Any) -> None:
        """Add a problem if the value of a key is not `allowed`."""
        found = self.value(key)
        if type(found) is not type(allowed) or found != allowed:
            self.add_problem(key, f"only {allowed!r} is supported, got {_shown(found)}")

    def object(self, key: str) -> Mapping[str, Any]:
        """A key's value, a JSON object; empty if missing or null."""
        found = self.table.get(key)
        if found is None or isinstance(found, Mapping):
            return found or {}
        self.add_problem(key, f"must be an object, got {_shown(found)}")
        return {}

    def add_problem(self, key: str, what: str) -> None:
        """Add a problem: the key with its prefix, and what is wrong with it."""
        self.problems.append(f"{self.prefix}{key}: {what}")


def _fits(found: Any, kind: type) -> bool:
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    if not -_LARGEST <= found <= _LARGEST:  # false for NaN
        return False
    return kind is float or math.floor(found) == found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def every_nth(flags: Sequence[bool], given: int) -> int | None:
    """The interval n that a list of flags, one for each layer, has: flag i, from 0, is true if (i + 1) % n == 0.

    Args:
        flags: one for each layer; if none is true, n is above their number.
        given: the result if it has these flags, as several do where few are true.

    Returns:
        None if no interval has these flags.
    """
    first = [*flags, True].index(True) + 1
    fitting = (n for n in (given, first) if n > 0 and all(flag == ((i + 1) % n == 0) for i, flag in enumerate(flags)))
    return next(fitting, None)
