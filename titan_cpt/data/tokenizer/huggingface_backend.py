"""The `tokenizers` backend: encodes any tokenizer.json, keeps names of special tokens as text, counts lost characters.

tokenizers is imported inside functions, so that a plan, which needs only the vocabulary size, starts quickly.
"""

import functools
import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from titan_cpt.data.tokenizer.byte_level import BYTE_OF
from titan_cpt.data.tokenizer.encoded import Encoded, id_dtype, joined
from titan_cpt.data.tokenizer.special_tokens import (
    BYTE_NAME,
    GuardedSpec,
    is_byte_level,
    kind_of,
    model_vocab,
    without_byte_fallback,
)
from titan_cpt.errors import DataError, how_to_install

# Kinds of ids that need an extra check.
_FORBIDDEN = 1
_BYTE = 2
_UNKNOWN = 3


class HuggingFaceBackend:
    """The `tokenizers` library: supports every tokenizer.json; many times slower than gigatoken."""

    def __init__(self, spec: dict[str, Any], name: str, guarded: GuardedSpec, table: Sequence[bytes]) -> None:
        """Open a tokenizer.

        Args:
            spec: content of the tokenizer.json.
            name: path of the tokenizer.json, for messages.
            guarded: the same content, changed so that no text becomes a special token.
            table: the bytes of every id.

        Raises:
            DataError: the library is not installed, or rejects the file.
        """
        self._name = name
        self._guarded = guarded
        self._tokenizer = _library_tokenizer(spec, name)
        _check_ids(self._tokenizer, spec, name)
        self._encoder = self._tokenizer if guarded.spec is spec else _library_tokenizer(guarded.spec, name)
        self._forbidden = {number: token for token, number in guarded.names.items() if number != guarded.unknown_id}
        marked = {**dict.fromkeys(self._forbidden, _FORBIDDEN), **dict.fromkeys(guarded.byte_ids, _BYTE)}
        if guarded.unknown_id is not None:
            marked[guarded.unknown_id] = _UNKNOWN
        self._marks = np.zeros(max(len(table), *marked, 0) + 1, dtype=np.int8)
        self._marks[list(marked)] = list(marked.values())
        model = guarded.spec["model"]
        self._drops = kind_of(model) == "BPE" and not model.get("unk_token") and not model.get("byte_fallback")
        self._dtype = id_dtype(len(table))
        self._byte_level = is_byte_level(spec)
        self._alphabet = _alphabet(model, byte_level=self._byte_level) if self._drops else frozenset()
        self._is_dropped: dict[str, bool] = {}
        matched = [token["content"] for token in spec.get("added_tokens") or [] if not token.get("special")]
        self._matched = re.compile("|".join(map(re.escape, matched))) if matched else None

    def encode(
        self,
        texts: Sequence[str],
        *,
        utf8: Sequence[bytes] | None = None,
        begin: Sequence[int] = (),
        end: Sequence[int] = (),
    ) -> Encoded:
        """See TokenizerBackend; `utf8` is not used.

        Raises:
            DataError: a text contains the name of a special or byte token that cannot be kept as text.
        """
        encodings = self._encoder.encode_batch(list(texts), add_special_tokens=False)
        parts: list[Sequence[int]] = [encoding.ids for encoding in encodings]
        lost = {}
        for number, marks in self._marked(parts):
            if _BYTE in marks:
                parts[number] = self._without_named_bytes(texts[number], encodings[number])
            if _UNKNOWN in marks:
                spans = zip(encodings[number].ids, encodings[number].offsets, strict=True)
                unknown = self._guarded.unknown_id
                lost[number] = "".join(texts[number][start:end] for token, (start, end) in spans if token == unknown)
            if _FORBIDDEN in marks:
                token = next(self._forbidden[one] for one in parts[number] if one in self._forbidden)
                raise DataError(f"{self._name}: a text becomes the special token {token!r}: {excerpt(texts[number])}")
        if self._drops:
            lost = {number: dropped for number, text in enumerate(texts) if (dropped := self._dropped(text))}
        arrays = [[np.array(part, dtype=self._dtype)] for part in parts]
        return joined(arrays, self._dtype, begin=begin, end=end, lost=lost)

    def normalized(self, text: str) -> str:
        """Return the text after the file's normalizer."""
        normalizer = self._encoder.normalizer
        return str(normalizer.normalize_str(text)) if normalizer else text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; special tokens are decoded to their names."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _marked(self, parts: Sequence[Sequence[int]]) -> list[tuple[int, set[int]]]:
        """Return (index, kinds of ids) of the texts that contain ids which need an extra check."""
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        marks = self._marks[np.fromiter(chain.from_iterable(parts), np.int32, int(lengths.sum()))]
        positions = np.flatnonzero(marks)
        text_indices = np.searchsorted(np.cumsum(lengths), positions, side="right")
        found: dict[int, set[int]] = {}
        for text_index, mark in zip(text_indices.tolist(), marks[positions].tolist(), strict=True):
            found.setdefault(text_index, set()).add(mark)
        return [*found.items()]

    def _without_named_bytes(self, text: str, encoding: Any) -> list[int]:
        """Return the ids of a text in which only unknown characters, not names of byte tokens, become byte tokens."""
        if kind_of(self._guarded.spec["model"]) != "Unigram":
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            if any(number in self._guarded.byte_ids and end - start > 1 for number, (start, end) in spans):
                raise DataError(
                    f"{self._name}: a text contains the name of a byte token, such as <0x0A>, which this model encodes "
                    f"as the byte: {excerpt(text)}. Remove it from the text"
                )
            return list(encoding.ids)
        if not BYTE_NAME.search(self.normalized(text)):
            return list(encoding.ids)
        encoding = self._without_fallback.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for number, characters in zip(encoding.ids, encoding.tokens, strict=True):
            unknown = number == self._guarded.unknown_id
            ids += [self._guarded.byte_ids[byte] for byte in characters.encode()] if unknown else [number]
        return ids

    @functools.cached_property
    def _without_fallback(self) -> Any:
        return _library_tokenizer(without_byte_fallback(self._guarded.spec), self._name)

    def _dropped(self, text: str) -> str:
        """Return the characters of a text that a BPE without an unknown token drops."""
        if self._matched is not None:
            text = self._matched.sub("", text)
        for character in set(text).difference(self._is_dropped):  # "-" would look at every known character
            normal = self.normalized(character)
            parts = normal.encode() if self._byte_level else normal.replace("\u2581", "")
            self._is_dropped[character] = not character.isspace() and not self._alphabet.issuperset(parts)
        return "".join(character for character in text if self._is_dropped[character])


def _library_tokenizer(spec: dict[str, Any], name: str) -> Any:
    """Open a tokenizer of the `tokenizers` library that encodes names of special tokens as text."""
    try:
        import tokenizers
    except ImportError as fault:
        raise DataError(
            f"{name}: gigatoken cannot encode this; the `tokenizers` library is needed ({fault}); "
            f"{how_to_install('tokenizers')}"
        ) from fault
    plain = {**spec, "truncation": None, "padding": None, "post_processor": None}
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as fault:
        # The library raises nothing more specific than Exception. Some versions panic in Rust, which is no Exception,
        # where a merge's right part is shorter than the model's continuing_subword_prefix.
        raise DataError(f"{name}: the `tokenizers` library cannot read it: {fault}") from fault
    tokenizer.encode_special_tokens = True
    return tokenizer


def _alphabet(model: dict[str, Any], *, byte_level: bool) -> frozenset[str] | frozenset[int]:
    """Return the characters, or the bytes, that a BPE starts from."""
    prefix = model.get("continuing_subword_prefix") or ""
    single = {token for word in model["vocab"] if len(token := word.removeprefix(prefix)) == 1}
    return frozenset(BYTE_OF[token] for token in single & BYTE_OF.keys()) if byte_level else frozenset(single)


def _check_ids(tokenizer: Any, spec: dict[str, Any], name: str) -> None:
    """Raise DataError if the library gives a token another id than the file."""
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    wanted = {**model_vocab(spec["model"]), **added}
    found = tokenizer.get_vocab(with_added_tokens=True)
    if found == wanted:
        return
    token = next(token for token in {**wanted, **found} if found.get(token) != wanted.get(token))
    raise DataError(
        f"{name}: {token!r} has id {wanted.get(token)} in the file, but {found.get(token)} in the `tokenizers` "
        "library, which transformers uses after an export: save the file again with that library"
    )


def excerpt(text: str) -> str:
    """Return a text's representation for a message, shortened."""
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."
