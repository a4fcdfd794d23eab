"""Whether two tokenizers give the same ids, whatever their files look like. Imports no torch.

A tokenizer.json that transformers saved again has other bytes, and the byte tokenizer has a file only once it was
exported: the fingerprint of the file cannot compare them, what decides the ids can.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from titan_cpt.data.tokenizer.tiktoken_bpe import token_bytes
from titan_cpt.data.tokenizer.tokenizer import BYTES, END_OF_DOCUMENT, fingerprint_of
from titan_cpt.errors import DataError

_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


def ids_fingerprint(path: str) -> str:
    """SHA-256 over the vocabulary, merges, normalizer, pre-tokenizer and added tokens: equal where all ids are equal.

    Args:
        path: "bytes", a tokenizer.json or a folder that holds one.

    Raises:
        DataError: the file is missing or is no tokenizer.json.
    """
    if path == BYTES:
        spec = byte_tokenizer_json(256)
    else:
        fingerprint_of(path)  # raises what is wrong with the file
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        spec = json.loads(file.read_text(encoding="utf-8"))
    try:
        decisive = {
            "model": _model(spec["model"]),
            "normalizer": _without_nulls(spec.get("normalizer")),
            "pre_tokenizer": _without_nulls(spec.get("pre_tokenizer")),
            "added_tokens": sorted(
                [token["id"], token["content"], *(bool(token.get(flag)) for flag in _FLAGS)]
                for token in spec.get("added_tokens") or []
            ),
        }
    except (AttributeError, KeyError, TypeError) as error:  # of a file that is built otherwise than all others
        raise DataError(f"{path}: is no tokenizer.json of the usual build ({type(error).__name__}: {error})") from None
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def byte_tokenizer_json(eod_id: int) -> dict[str, Any]:
    """The byte tokenizer as a tokenizer.json: a byte-level BPE that has no merges, its ids the bytes themselves."""
    vocabulary = {}
    for code in range(0x144):
        with contextlib.suppress(KeyError):  # the characters that stand for no byte
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


def _model(model: dict[str, Any]) -> dict[str, Any]:
    """Without what is off; merges as pairs, which older files write as one string, and the type, which they omit."""
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]
    kept = {key: value for key, value in model.items() if value not in (None, False, "", [])}
    return {"type": "BPE" if "merges" in model else None, **kept, "merges": merges}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
