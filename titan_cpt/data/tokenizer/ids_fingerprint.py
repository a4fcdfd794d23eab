"""A fingerprint of the ids that a tokenizer gives, independent of how its file is written. Does not import torch.

transformers saves a tokenizer.json with other bytes than it read, and the byte tokenizer has a file only after an
export. The hash of the file cannot compare such tokenizers; the hash of everything that determines the ids can.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from titan_cpt.data.tokenizer.byte_level import token_bytes
from titan_cpt.data.tokenizer.tokenizer import BYTES, END_OF_DOCUMENT, fingerprint_of
from titan_cpt.errors import DataError

_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


def ids_fingerprint(path: str, *, as_written: bool = False) -> str:
    """SHA-256 over the vocabulary, merges, normalizer, pre-tokenizer and added tokens: equal where all ids are equal.

    Args:
        path: "bytes", a tokenizer.json, or the folder of one.
        as_written: take the options of the pre-tokenizer as the file has them, as older imports recorded it: a file
            that omits an option and one that states its default then differ.

    Raises:
        DataError: the file is missing or is not a tokenizer.json.
    """
    if path == BYTES:
        spec = byte_tokenizer_json(256)
    else:
        fingerprint_of(path)  # raises DataError for an unreadable file
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        spec = json.loads(file.read_text(encoding="utf-8"))
    try:
        decisive = {
            "model": _model(spec["model"]),
            "normalizer": _without_nulls(spec.get("normalizer")),
            "pre_tokenizer": (_without_nulls if as_written else with_same_ids)(spec.get("pre_tokenizer")),
            "added_tokens": sorted(
                [token["id"], token["content"], *(bool(token.get(flag)) for flag in _FLAGS)]
                for token in spec.get("added_tokens") or []
            ),
        }
    except (AttributeError, KeyError, TypeError) as error:  # a file of unusual structure
        raise DataError(f"{path}: is not a valid tokenizer.json ({type(error).__name__}: {error})") from None
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def byte_tokenizer_json(eod_id: int) -> dict[str, Any]:
    """Return the byte tokenizer as a tokenizer.json: a byte-level BPE without merges, whose ids are the bytes."""
    vocabulary = {}
    for code in range(0x144):
        with contextlib.suppress(KeyError):  # a character that represents no byte
            vocabulary[chr(code)] = token_bytes(chr(code))[0]
    end = {"id": eod_id, "content": END_OF_DOCUMENT, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def with_same_ids(pre_tokenizer: Any) -> Any:
    """One spelling of all pre-tokenizers that split alike: without defaults, offsets and the keys of older libraries.

    The `tokenizers` library, and so transformers' save_pretrained, writes defaults that older files omit.
    """
    if isinstance(pre_tokenizer, list):
        return [with_same_ids(each) for each in pre_tokenizer]
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    found = {key: with_same_ids(value) for key, value in pre_tokenizer.items() if value is not None}
    if found.get("type") == "ByteLevel":
        return {key: found[key] for key in found if key != "trim_offsets" and (key, found[key]) != ("use_regex", True)}
    if found.get("type") == "Metaspace":
        scheme = "always" if found.pop("add_prefix_space", True) else "never"
        found.pop("str_rep", None)
        return {"prepend_scheme": scheme, "split": True} | found
    return found


def _model(model: dict[str, Any]) -> dict[str, Any]:
    """Normalize a model: drop unset options, write merges as pairs and add the type, which older files omit."""
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]
    kept = {key: value for key, value in model.items() if value not in (None, False, "", [])}
    return {"type": "BPE" if "merges" in model else None, **kept, "merges": merges}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
