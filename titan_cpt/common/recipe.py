"""Recipes: the settings that fix a run's numbers, compared key by key and hashed. The keys are listed by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def differences(recorded: Mapping[str, Any], planned: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every key of two recipes that is not the same."""
    lines = []
    for key in sorted({*recorded, *planned}):
        old, new = recorded.get(key, "not set"), planned.get(key, "not set")
        if json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):
            lines.append(f"{key}: {_shown(old)} -> {_shown(new)}")
    return lines


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits over a recipe, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
