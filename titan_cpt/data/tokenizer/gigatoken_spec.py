"""What gigatoken needs to give the ids of a byte-level tokenizer.json: the model, its split pattern, its added tokens.

gigatoken reads a tokenizer.json itself, but ignores parts that change ids: it matches names of special tokens, ignores
`single_word` and pre-tokenizers that it does not know beside a known one, and matches added tokens in one pass where
the `tokenizers` library makes two, before and after normalization. `to_gigatoken` therefore refuses or removes
these parts.
"""

import json
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import orjson

from titan_cpt.data.tokenizer.byte_level import BYTE_OF, NEVER_IN_UTF8

_MAX_IDS = 1 << 21  # gigatoken packs two ids and the id of their product into 63 bits


class UnsupportedTokenizerError(Exception):
    """The reason why gigatoken cannot give the ids of this file; the caller then uses the `tokenizers` library."""


@dataclass(frozen=True)
class GigatokenSpec:
    """A tokenizer for gigatoken, and what to do with a text before gigatoken encodes it."""

    content: bytes
    """The tokenizer.json that gigatoken reads: no normalizer and no special tokens."""
    nfc: bool
    """Whether texts are normalized to Unicode form NFC first."""
    added: dict[int, str]
    """Id -> content of the added tokens that gigatoken matches."""
    raw_tokens: bool
    """Whether added tokens are matched before normalization."""
    hiding_names: tuple[str, ...]
    """Special tokens whose name, in a text, would keep an added token inside or after it from being matched."""
    may_cut: bool
    """Whether a text may be cut between a letter and a space: no added token contains both."""


def to_gigatoken(spec: dict[str, Any]) -> GigatokenSpec:
    """Convert the content of a tokenizer.json.

    Raises:
        UnsupportedTokenizerError: gigatoken would not give the same ids; the message is the reason.
    """
    model = spec["model"]
    _check_model(model)
    nfc = _is_nfc(spec.get("normalizer"))
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    _check_pre_tokenizer(pre_tokenizer)
    # No text contains these tokens, but their UTF-8 may be that of a token which a text does contain.
    vocab = model["vocab"]
    if not BYTE_OF.keys() >= {*"".join(vocab)}:
        vocab = {token: number for token, number in vocab.items() if BYTE_OF.keys() >= {*token}}
    merges = _merges_of(model["merges"], vocab)
    raw, normal = _Added(nfc=False), _Added(nfc=nfc)
    for token in spec.get("added_tokens") or []:
        (normal if token.get("normalized", not token.get("special", False)) else raw).add(token)
    _check_added(raw.matched, normal.matched)
    added = {number: text for text, number in {**normal.matched, **raw.matched}.items()}
    ordinary = {"special": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "added_tokens": [{"id": number, "content": text, **ordinary} for number, text in added.items()],
        "pre_tokenizer": pre_tokenizer,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "ignore_merges": bool(model.get("ignore_merges")),
        },
    }
    names = [*raw.matched, *normal.matched, *raw.special, *normal.special]
    return GigatokenSpec(
        content=_json(content),
        nfc=nfc,
        added=added,
        raw_tokens=bool(raw.matched),
        hiding_names=(*raw.hiding_names(), *normal.hiding_names()),
        may_cut=not any(" " in name.lstrip(" ") or "\n" in name for name in names),
    )


def _json(content: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(content)
    except TypeError:  # half of a surrogate pair, or an integer of more than 64 bits
        return json.dumps(content).encode()


def _check_model(model: dict[str, Any]) -> None:
    """Raise UnsupportedTokenizerError unless the model is a plain BPE over all bytes."""
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedTokenizerError(f"its model is {model['type']}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise UnsupportedTokenizerError(f"its model sets {key}")
    lost = [byte for character, byte in BYTE_OF.items() if character not in model["vocab"]]
    if lost := sorted(set(lost) - NEVER_IN_UTF8):
        raise UnsupportedTokenizerError(f"its vocabulary lacks {len(lost)} bytes of UTF-8, which it drops from texts")


def _is_nfc(normalizer: dict[str, Any] | None) -> bool:
    """Whether the normalizer is NFC; False without a normalizer or for an empty sequence."""
    parts = _sequence(normalizer, "normalizers")
    if [part["type"] for part in parts] not in ([], ["NFC"]):
        names = ", ".join(part["type"] for part in parts)
        raise UnsupportedTokenizerError(f"its normalizer is {names}, not NFC or none")
    return bool(parts)


def _check_pre_tokenizer(pre_tokenizer: dict[str, Any]) -> None:
    """Raise UnsupportedTokenizerError unless it is GPT-2's, or Splits and ByteLevel; gigatoken checks the pattern."""
    parts = _sequence(pre_tokenizer, "pretokenizers")
    kinds = [part["type"] for part in parts]
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space", True):
        names = ", ".join(kinds) or "none"
        raise UnsupportedTokenizerError(f"its pre-tokenizer is {names}, not ByteLevel without a prefix space")
    splits = parts[:-1]
    if bool(splits) == bool(parts[-1].get("use_regex", True)) or any(kind != "Split" for kind in kinds[:-1]):
        raise UnsupportedTokenizerError(f"its pre-tokenizer ({', '.join(kinds)}) is neither GPT-2's nor Split's kind")
    if any(
        split["behavior"] != "Isolated" or split.get("invert") or "Regex" not in split["pattern"] for split in splits
    ):
        raise UnsupportedTokenizerError("its pre-tokenizer's Split does not isolate what a regular expression matches")


def _sequence(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the parts of a Sequence, or a list of the single part."""
    if not part:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _merges_of(merges: list[Any], vocab: dict[str, int]) -> list[Any]:
    """Return the merges that produce tokens of the vocabulary, in the file's form: "left right" or [left, right].

    Raises:
        UnsupportedTokenizerError: gigatoken may read their priority otherwise: equal pairs, equal neighboring products.
    """
    if max(vocab.values()) >= _MAX_IDS:
        raise UnsupportedTokenizerError(f"its ids reach {max(vocab.values())}")
    if {*map(type, merges)} == {str} and all(" " in merge for merge in merges):
        products = [merge.replace(" ", "", 1) for merge in merges]
        distinct = len({*merges})
    else:
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
        products = [left + right for left, right in merges]
        distinct = len({(left, right) for left, right in merges})
    if distinct != len(merges):
        raise UnsupportedTokenizerError("its merges contain a pair twice")
    if not vocab.keys() >= {*products}:
        merges = [merge for merge, product in zip(merges, products, strict=True) if product in vocab]
        products = [product for product in products if product in vocab]
    for first, second in pairwise(products):
        if first == second:
            raise UnsupportedTokenizerError(f"its merges produce {first!r} in two ways")
    return merges


class _Added:
    """The added tokens that are matched in one pass: before normalization, or after it."""

    def __init__(self, *, nfc: bool) -> None:
        self.matched: dict[str, int] = {}
        self.special: list[str] = []
        self._nfc = nfc

    def add(self, token: dict[str, Any]) -> None:
        """Add a token; raises UnsupportedTokenizerError for flags that gigatoken ignores."""
        content = unicodedata.normalize("NFC", token["content"]) if self._nfc else token["content"]
        if token.get("special"):
            self.special.append(content)
            return
        if any(token.get(key) for key in ("single_word", "lstrip", "rstrip")):
            raise UnsupportedTokenizerError(f"its added token {content!r} sets single_word, lstrip or rstrip")
        self.matched[content] = token["id"]

    def hiding_names(self) -> list[str]:
        """Names of special tokens in which, or at whose end, one of the other tokens may begin."""
        return [name for name in self.special if any(_may_begin_in(name, token) for token in self.matched)]


def _check_added(raw: Collection[str], normal: Collection[str]) -> None:
    """Refuse added tokens that gigatoken, which matches all in one pass, may match instead of one another."""
    for one, other in product(raw, normal):
        if _may_begin_in(one, other) or _may_begin_in(other, one):
            raise UnsupportedTokenizerError(
                f"its added tokens {one!r} and {other!r} overlap, and only one of them is matched before normalization"
            )


def _may_begin_in(name: str, token: str) -> bool:
    """Whether an occurrence of a token may begin inside an occurrence of a name."""
    return token in name or any(name.endswith(token[:length]) for length in range(1, len(token)))
