"""Pieces of messages: "did you mean", lists of names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest(word: str, known: Sequence[str]) -> str:
    """A half-sentence that offers the likeliest of the known words, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(words: Sequence[str]) -> str:
    """The words in quotes, with commas."""
    return ", ".join(repr(word) for word in words) or "none"
