"""Recipes: the settings that determine a run's numbers, listed by hand in planning/; comparing and hashing them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def differences(recorded: Mapping[str, Any], planned: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every key in which two recipes differ, sorted."""
    lines = []
    for key in sorted({*recorded, *planned}):
        old = recorded.get(key, "not set")
        new = planned.get(key, "not set")
        if json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):
            lines.append(f"{key}: {_shown(old)} -> {_shown(new)}")
    return lines


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """Hash of a recipe in eight hexadecimal digits; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
