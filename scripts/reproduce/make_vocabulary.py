"""Text, tokenizers and tokens of the runs with an extended vocabulary. reproduce.py calls this."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BASE_ENTRIES, ADDED_ENTRIES = 2048, 1024
_EVERY = {"english": 8, "german": 8, "english-heldout": 16, "german-heldout": 32}
"""One document of so many, from all novels: 7.8 and 7.0 MB to train on, 150 and 168 kB of validation text."""
_TITAN = (sys.executable, "-m", "titan_cpt")


def make_vocabulary_data(data: Path) -> None:
    """Select documents, train and extend the tokenizer, and prepare the tokens, in data/vocabulary, unless they exist.

    The validation text is prepared with both tokenizers: the same documents, in tokens of each.
    """
    folder = data / "vocabulary"
    folder.mkdir(parents=True, exist_ok=True)
    for name, every in _EVERY.items():
        selected = folder / f"{name.replace('heldout', 'validation')}.jsonl"
        if not selected.exists():
            selected.write_text(one_line_of(data / f"{name}.jsonl", every))
    base, extended = folder / "old.json", folder / "extended.json"
    if not base.exists():
        text = folder / "english.jsonl"
        _titan("prepare", "--input", text, "--train-tokenizer", BASE_ENTRIES, "--output", base)
    if not extended.exists():
        text = folder / "german.jsonl"
        _titan("tokenizer", "extend", "--base", base, "--input", text, "--add", ADDED_ENTRIES, "--output", extended)
    for name in ("english", "german", "english-validation", "german-validation"):
        _prepare(folder / f"{name}.jsonl", folder / name, base)
        if name != "english":  # its tokens of the base are replayed as they are
            _prepare(folder / f"{name}.jsonl", folder / f"{name}-extended", extended)


def one_line_of(path: Path, every: int) -> str:
    """One line of `every`, evenly spaced, beginning with the middle one of the first."""
    return "".join(path.read_text().splitlines(keepends=True)[every // 2 :: every])


def _prepare(text: Path, prefix: Path, tokenizer: Path) -> None:
    if not prefix.with_suffix(".idx").exists():
        _titan("prepare", "--input", text, "--output", prefix, "--tokenizer", tokenizer)


def _titan(*words: object) -> None:
    subprocess.run([*_TITAN, *map(str, words)], check=True)
