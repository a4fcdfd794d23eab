"""Notes about a tokenizer that `prepare` prints: speed, begin and end of documents, and losses in normalization."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_cpt.data.tokenizer.tokenizer import BYTES, Tokenizer

_LOSSES = {
    "upper case": ("Word", "word"),
    "accents": ("caf\u00e9", "cafe"),
    "line ends": ("word\nword", "word word"),
    "tabs": ("word\tword", "word word"),
    "runs of spaces": ("word  word", "word word"),
    "all spaces": ("word word", "wordword"),
    "spaces at the end": ("word  ", "word"),
    "compatibility forms (\ufb01 becomes fi, \u00b2 becomes 2)": ("\ufb01", "fi"),
}
"""A feature of texts -> two texts that differ only in it. The tokenizer loses the feature if both have the same ids."""


def tokenizer_notes(tokenizer: Tokenizer) -> list[str]:
    """Return the notes, one line each. Loads the tokenizer backend."""
    notes = [tokenizer.note, _bos(tokenizer), *_settings(tokenizer), _losses(tokenizer)]
    return [note for note in notes if note]


def _bos(tokenizer: Tokenizer) -> str | None:
    """A note if transformers would add a begin-of-document token and these documents have none."""
    if tokenizer.add_bos or tokenizer.bos is None or not tokenizer.bos.added:
        return None
    return (
        f"{tokenizer.name}: its post-processor adds {tokenizer.bos.name} before every text, but these documents do not "
        "have it; --add-bos (in a config, tokenizer.add_bos = true) adds it"
    )


def _settings(tokenizer: Tokenizer) -> Iterator[str]:
    """Notes on BPE dropout, which is disabled, and on an end-of-document token other than that of transformers."""
    if tokenizer.name == BYTES:
        return
    path = Path(tokenizer.name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if dropout := (_read(file).get("model") or {}).get("dropout"):
        yield f"{tokenizer.name}: its BPE dropout of {dropout} is disabled, so that a text always has the same tokens"
    eos = _read(file.parent / "tokenizer_config.json").get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    end_name = tokenizer.decode([tokenizer.eod_id])
    if isinstance(eos, str) and eos != end_name:
        yield (
            f"{tokenizer.name}: documents end with {end_name} (id {tokenizer.eod_id}), but the tokenizer_config.json "
            f"beside it has eos_token = {eos}"
        )


def _losses(tokenizer: Tokenizer) -> str | None:
    """A note on features of texts that the tokenizer loses; `prepare` counts characters without a token instead."""
    lost = []
    for feature, pair in _LOSSES.items():
        ids = tokenizer.encode_documents(pair)
        first = ids.ids[: ids.lengths[0]]
        second = ids.ids[ids.lengths[0] :]
        if not ids.lost and first.tolist() == second.tolist():
            lost.append(feature)
    if not lost:
        return None
    return (
        f"{tokenizer.name}: its normalizer or pre-tokenizer removes {', '.join(lost)} from every text: no model can "
        "learn them, and generated text never contains them"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
