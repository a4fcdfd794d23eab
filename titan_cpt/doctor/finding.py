"""What a check found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]
LEVELS: tuple[Level, ...] = ("ok", "note", "problem")


@dataclass(frozen=True)
class Finding:
    """One line of `titan-cpt doctor`.

    Attributes:
        level: ok; note: it may be intended, or slow; problem: training will fail or be wrong.
        topic: what was looked at, one or two words.
        text: what was found.
        remedy: what to do; "" if there is nothing to do.
    """

    level: Level
    topic: str
    text: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        """The attributes as a table."""
        return asdict(self)


def ok(topic: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding("ok", topic, text)


def note(topic: str, text: str, remedy: str = "") -> Finding:
    """Something that may be intended."""
    return Finding("note", topic, text, remedy)


def problem(topic: str, text: str, remedy: str) -> Finding:
    """Something that must be changed before training."""
    return Finding("problem", topic, text, remedy)
