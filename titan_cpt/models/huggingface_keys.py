"""Checked reading of a config.json: a key that is missing, null or of another type is a fault with its name.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

REQUIRED = object()
_LARGEST = 2**31 - 1  # no number of an architecture comes near it


class Keys:
    """Takes keys out of a table and collects what is wrong with them.

    Attributes:
        faults: a line for each wrong key.
        defaulted: the keys that were missing and have a default, `key = value`.
    """

    def __init__(self, table: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> None:
        """Args: a JSON object, the value of each key that may be missing, and what stands before a key in messages."""
        self.table, self.defaults, self.prefix = table, defaults, prefix
        self.faults = list[str]()
        self.defaulted = list[str]()

    def value(self, key: str) -> Any:
        """What the file says, or the default; REQUIRED where there is neither."""
        if key in self.table:
            return self.table[key]
        if key in self.defaults and self.defaults[key] is not None:
            self.defaulted.append(f"{key} = {self.defaults[key]!r}")
        return self.defaults.get(key, REQUIRED)

    def number(self, kind: type, key: str, *, null: Any = REQUIRED) -> Any:
        """A key as an int or a float; 1 after a fault, so that reading continues.

        Args:
            kind: int or float.
            key: its name.
            null: what a null, or a default of None, stands for; left out, null is a fault.
        """
        found = self.value(key)
        if found is None and null is not REQUIRED:
            return null
        if _fits(found, kind):
            return kind(found)
        absent = found is REQUIRED or (found is None and key not in self.defaults)
        fraction = ", not a whole one" if kind is int and _fits(found, float) else ""
        self.fault(key, "is missing" if absent else f"must be a number, got {_shown(found)}{fraction}")
        return kind(1)

    def flag(self, key: str) -> bool:
        """A key that is true or false."""
        found = self.value(key)
        if not isinstance(found, bool):
            self.fault(key, "is missing" if found is REQUIRED else f"must be true or false, got {_shown(found)}")
        return found is True

    def only(self, key: str, allowed: Any) -> None:
        """Refuse any value of a key except one."""
        found = self.value(key)
        if type(found) is not type(allowed) or found != allowed:
            self.fault(key, f"only {allowed!r} is supported, got {_shown(found)}")

    def object(self, key: str) -> Mapping[str, Any]:
        """A key that holds a JSON object; empty where it is missing or null."""
        found = self.table.get(key)
        if found is None or isinstance(found, Mapping):
            return found or {}
        self.fault(key, f"must be an object, got {_shown(found)}")
        return {}

    def fault(self, key: str, what: str) -> None:
        """Note what is wrong with a key."""
        self.faults.append(f"{self.prefix}{key}: {what}")


def _fits(found: Any, kind: type) -> bool:
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    if not -_LARGEST <= found <= _LARGEST:  # false for NaN
        return False
    return kind is float or math.floor(found) == found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
