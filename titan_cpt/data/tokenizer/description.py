"""What a tokenizer is, and what it adds to the one that it extends, for people and as JSON. Does not import torch."""

from __future__ import annotations

from typing import Any

from titan_cpt.data.tokenizer.extension import extension_of
from titan_cpt.data.tokenizer.special_tokens import is_byte_level, kind_of
from titan_cpt.data.tokenizer.tokenizer import BYTES, load_tokenizer, read_tokenizer


def tokenizer_parts(path: str, base: str | None = None) -> dict[str, Any]:
    """Describe a tokenizer.

    Args:
        path: "bytes", a tokenizer.json, or the folder of one.
        base: the tokenizer that it extends, if any.

    Raises:
        DataError: a file cannot be read, or does not extend the base.
    """
    tokenizer = load_tokenizer(path)
    spec: dict[str, Any] = {} if path == BYTES else read_tokenizer(path)[0]
    found = {
        "tokenizer": path,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "model": kind_of(spec["model"]) if spec else BYTES,
        "byte_level": not spec or is_byte_level(spec),
        "pre_tokenizer": _types(spec.get("pre_tokenizer")),
        "normalizer": _types(spec.get("normalizer")),
        "end_of_document": tokenizer.decode([tokenizer.eod_id]),
        "begin_of_document": None if tokenizer.bos is None else tokenizer.bos.name,
        "adds_bos": tokenizer.adds_bos_itself,
        "special_tokens": sorted(each["content"] for each in spec.get("added_tokens") or [] if each.get("special")),
    }
    return found if base is None else {**found, "extends": _extends(base, path)}


def _extends(base: str, path: str) -> dict[str, Any]:
    extension = extension_of(base, path)
    numbers = {*read_tokenizer(path)[1].values()}
    tokenizer = load_tokenizer(path)
    return {
        "base": base,
        "base_vocab_size": extension.base_vocab_size,
        "notes": list(extension.notes),
        "new_tokens": [tokenizer.decode([each]) for each in sorted(numbers) if each >= extension.base_vocab_size],
    }


def _types(part: Any) -> str:
    """The types in a part of a tokenizer.json, such as `Split, ByteLevel`; `none` without one."""
    if not isinstance(part, dict):
        return "none"
    inner = part.get("pretokenizers") or part.get("normalizers")
    if not isinstance(inner, list):
        return str(part.get("type"))
    return ", ".join(_types(each) for each in inner)
