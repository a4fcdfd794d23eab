"""Parts of messages: "did you mean", lists of names, lines that fit a width."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], *, at_most: int = 1) -> str:
    """'; did you mean 'x'?' for the known words closest to a misspelt one, or "" if none is close."""
    close = difflib.get_close_matches(word, list(known), n=at_most)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def quoted_list(words: Iterable[str]) -> str:
    """The words in quotes, separated by commas; "none" for no words."""
    return ", ".join(map(repr, words)) or "none"


def problem_list(faults: list[str]) -> str:
    """The number of problems, and up to ten of them, one per line."""
    shown = faults[:10] + ([f"and {len(faults) - 10} more"] if len(faults) > 10 else [])
    count = "1 problem" if len(faults) == 1 else f"{len(faults)} problems"
    return "\n  - ".join([count, *shown])


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, except where a single word is longer; all but the first are indented."""
    indent = " " * (len(text) - len(text.lstrip(" ")))
    return textwrap.wrap(
        text.strip(),
        max(width, 20),
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
