"""The Tokenizer: text to token ids and back, from bytes or a tokenizer.json; uses gigatoken if its ids are the same.

The name of a special token in a text, such as a literal <|endoftext|>, is text: only `encode_documents` adds the
end-of-document id.

Opening a tokenizer only reads its file; the backend is loaded with the first text.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_cpt.data.tokenizer.backends import BytesBackend, TokenizerBackend, best_backend
from titan_cpt.data.tokenizer.byte_level import token_bytes
from titan_cpt.data.tokenizer.encoded import Encoded
from titan_cpt.data.tokenizer.gigatoken_backend import GigatokenBackend
from titan_cpt.data.tokenizer.special_tokens import (
    BEGIN_NAMES,
    END_NAMES,
    BosToken,
    GuardedSpec,
    check_added_tokens,
    find_bos_token,
    is_byte_level,
    keep_text_as_text,
    model_vocab,
    usual_name,
)
from titan_cpt.errors import DataError

BYTES = "bytes"
END_OF_DOCUMENT = "<|endoftext|>"
_MAX_IDS = 1 << 24  # larger than any vocabulary; bounds the table of all ids


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer: encodes text to ids and decodes ids to text."""

    name: str
    """"bytes", or the path of the tokenizer.json."""
    fingerprint: str
    """SHA-256 of the file's content; tokenizers with the same fingerprint give the same ids."""
    vocab_size: int
    """Ids are in [0, vocab_size); some of them may be unused."""
    eod_id: int
    """Id of the end-of-document token, added to every document."""
    bos: BosToken | None
    """The begin-of-document token; None if the vocabulary has no such token."""
    _table: tuple[bytes, ...]
    _special_ids: frozenset[int]
    _spec: dict[str, Any] | None
    _guarded: GuardedSpec | None
    add_bos: bool = False
    """Whether documents and prompts begin with the begin-of-document token."""

    @property
    def note(self) -> str | None:
        """Why the slower backend is used, or None. Loads the backend."""
        return self._backend[1]

    @property
    def adds_bos_itself(self) -> bool:
        """Whether the file's post-processor, and so transformers, adds a begin-of-document token to each text."""
        return self.bos is not None and self.bos.added

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-document token, if documents begin with it."""
        return self.bos.ids[0] if self.bos is not None and self.add_bos else None

    def with_bos(self, add_bos: bool) -> "Tokenizer":
        """Return the same tokenizer with `add_bos` set.

        Raises:
            DataError: the tokenizer has no begin-of-document token, or adds several tokens before a text.
        """
        if add_bos == self.add_bos:
            return self
        if add_bos and self.bos is None:
            raise DataError(
                f"{self.name}: has no begin-of-document token: its post-processor adds none, and its vocabulary has "
                f"none of {', '.join(BEGIN_NAMES)}. Remove --add-bos and tokenizer.add_bos"
            )
        if add_bos and self.bos is not None and len(self.bos.ids) > 1:
            raise DataError(
                f"{self.name}: its post-processor adds {len(self.bos.ids)} tokens before a text ({self.bos.name}); "
                "only one is supported. Remove --add-bos and tokenizer.add_bos"
            )
        if add_bos and self.bos is not None:
            (number,) = self.bos.ids
            if number not in range(self.vocab_size) or self._table[number] != self.bos.name.encode():
                raise DataError(
                    f"{self.name}: its post-processor gives {self.bos.name} the id {number}, but its vocabulary "
                    "does not: download the file again"
                )
        return replace(self, add_bos=add_bos)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt: those of `encode`, after the begin-of-document id if `add_bos` is set."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without the end-of-document id.

        Raises:
            DataError: the text contains half of a surrogate pair, or needs a library that is not installed.
        """
        ids: list[int] = self._encode([text]).ids.tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; see encode."""
        ids, lengths, _ = self._encode(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []

    def encode_documents(self, texts: Sequence[str], utf8: Sequence[bytes] | None = None) -> Encoded:
        """Return the concatenated ids of all documents, with begin- and end-of-document ids, and their lengths.

        Args:
            texts: the documents.
            utf8: the same documents in UTF-8, if the caller has them; saves encoding them once more.

        Raises:
            DataError: see encode.
        """
        begin = () if self.bos_id is None else (self.bos_id,)
        return self._encode(texts, utf8=utf8, begin=begin, end=(self.eod_id,))

    def encode_pieces(self, pieces: Iterable[str]) -> Encoded:
        """Return the same as `encode_documents` for one document, given in pieces; long ones take less memory so."""
        backend = self._backend[0]
        if not isinstance(backend, GigatokenBackend):
            return self.encode_documents(["".join(pieces)])
        return backend.encode_pieces(pieces, begin=() if self.bos_id is None else (self.bos_id,), end=(self.eod_id,))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens become their names, bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        for number in ids:
            if not 0 <= number < self.vocab_size:
                raise DataError(f"{self.name}: id {number}; allowed are ids from 0 to {self.vocab_size - 1}")
        return self._backend[0].decode(ids)

    def token_bytes_by_id(self) -> tuple[bytes, ...]:
        """Return the bytes of each id: the name of a special token, b"" for an id that no token has."""
        return self._table

    def token_byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of UTF-8 bytes of each id, 0 for special tokens; used for bits per byte."""
        lengths = np.array([len(token) for token in self._table], dtype=np.int64)
        lengths[list(self._special_ids)] = 0
        return lengths

    @functools.cached_property
    def _backend(self) -> tuple[TokenizerBackend, str | None]:
        if self._spec is None or self._guarded is None:
            return BytesBackend(self._table), None
        with _valid_tokenizer_json(self.name):
            return best_backend(self._spec, self.name, self._guarded, self._table)

    def _encode(
        self,
        texts: Sequence[str],
        *,
        utf8: Sequence[bytes] | None = None,
        begin: Sequence[int] = (),
        end: Sequence[int] = (),
    ) -> Encoded:
        try:
            return self._backend[0].encode(texts, utf8=utf8, begin=begin, end=end)
        except UnicodeEncodeError as fault:
            raise DataError(
                f"a text contains {fault.object[fault.start]!r}, half of a surrogate pair and not a character"
            ) from fault


def load_tokenizer(path: str) -> Tokenizer:
    """Open a tokenizer.

    Args:
        path: "bytes" (ids 0 to 255 are bytes, 256 ends a document), a tokenizer.json, or the folder of one.

    Raises:
        DataError: the file is missing, is not a tokenizer.json, or has no end-of-document token.
    """
    if path == BYTES:
        table = (*(bytes([byte]) for byte in range(256)), END_OF_DOCUMENT.encode())
        return Tokenizer(BYTES, fingerprint_of(BYTES), len(table), 256, None, table, frozenset({256}), None, None)
    content, spec = _read(path)
    with _valid_tokenizer_json(path):
        added = spec.get("added_tokens") or []
        numbers = _numbers(path, spec)
        eod = _end_of_document(path, spec, numbers)
        bos = find_bos_token(spec, numbers)
        # Begin- and end-of-document tokens are special even if the file does not declare them so.
        marks = {eod, bos.name if bos else eod}
        safe = [{**token, "special": True} if token["content"] in marks else token for token in added]
        spec = {**spec, "added_tokens": safe}
        if spec["model"].get("dropout"):  # it would encode a text differently each time
            spec = {**spec, "model": {**spec["model"], "dropout": None}}
        guarded = keep_text_as_text(spec, eod)
        return Tokenizer(
            name=path,
            fingerprint=hashlib.sha256(content).hexdigest(),
            vocab_size=max(numbers.values()) + 1,
            eod_id=numbers[eod],
            bos=bos,
            _table=_byte_table(spec, numbers),
            _special_ids=frozenset(guarded.names.values()),
            _spec=spec,
            _guarded=guarded,
        )


def vocab_size_of(path: str) -> int:
    """Return the vocabulary size (largest id + 1, added tokens included) without loading a backend.

    Raises:
        DataError: the file is missing or is not a tokenizer.json.
    """
    if path == BYTES:
        return 257
    with _valid_tokenizer_json(path):
        return max(_numbers(path, _read(path)[1]).values()) + 1


def read_tokenizer(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the content of a tokenizer.json, and the id of each token, added tokens included; loads no backend.

    Args:
        path: a tokenizer.json, or the folder of one.

    Raises:
        DataError: the file is missing, or is not a tokenizer.json.
    """
    with _valid_tokenizer_json(path):
        spec = _read(path)[1]
        return spec, _numbers(path, spec)


def fingerprint_of(path: str) -> str:
    """Return the fingerprint of a tokenizer without loading a backend.

    Raises:
        DataError: the file is missing or is not a tokenizer.json.
    """
    return hashlib.sha256(b"titan_cpt bytes 1" if path == BYTES else _read(path)[0]).hexdigest()


@contextmanager
def _valid_tokenizer_json(path: str) -> Iterator[None]:
    """Raise DataError if parsing a tokenizer.json in the block fails: the file has an unusual structure."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as fault:
        raise DataError(
            f"{path}: is not a valid tokenizer.json ({type(fault).__name__}: {fault}); download the file again"
        ) from fault


def _read(path: str) -> tuple[bytes, dict[str, Any]]:
    """Return the content of a tokenizer.json, raw and parsed."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        content = file.read_bytes()
    except OSError as fault:
        raise DataError(
            f"{file}: {fault.strerror}; a tokenizer is {BYTES!r}, a tokenizer.json, or the folder of one"
        ) from fault
    try:
        spec = json.loads(content)
    except (ValueError, RecursionError) as fault:
        raise DataError(f"{file}: is not JSON ({fault}); allowed is a tokenizer.json, not a tokenizer.model") from fault
    model = spec.get("model") if isinstance(spec, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not vocab or not isinstance(vocab, dict | list):
        raise DataError(f"{file}: has no model.vocab; allowed is a tokenizer.json of the `tokenizers` library")
    return content, spec


def _numbers(path: str, spec: dict[str, Any]) -> dict[str, int]:
    """Return token -> id, added tokens included."""
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    numbers = {**model_vocab(spec["model"]), **added}
    found = numbers.values()
    valid = {*map(type, found)} == {int} and min(found) >= 0 and max(found) < _MAX_IDS
    for token, number in () if valid else numbers.items():
        if type(number) is not int or not 0 <= number < _MAX_IDS:
            raise ValueError(f"the id of {token!r} must be an integer from 0 to {_MAX_IDS - 1}, got {number!r}")
    check_added_tokens(path, spec)
    return numbers


def _end_of_document(path: str, spec: dict[str, Any], numbers: dict[str, int]) -> str:
    """Return the name of the end-of-document token; names that the file declares special come first."""
    name = usual_name(END_NAMES, spec, numbers)
    if name is not None:
        return name
    added = spec.get("added_tokens") or []
    special = ", ".join(repr(token["content"]) for token in added if token.get("special")) or "none"
    raise DataError(
        f"{path}: has no end-of-document token; allowed are {', '.join(END_NAMES)}. Its special tokens are {special}. "
        "Add one of the allowed names to its added_tokens"
    )


def _byte_table(spec: dict[str, Any], numbers: dict[str, int]) -> tuple[bytes, ...]:
    """Return the bytes of each id: the name for a special token, b"" for an unused id."""
    added = {token["content"] for token in spec.get("added_tokens") or []}
    byte_level = is_byte_level(spec)
    table = [b""] * (max(numbers.values()) + 1)
    for token, number in numbers.items():
        if token in added:
            table[number] = token.encode()
        elif byte_level:
            table[number] = token_bytes(token)
        elif len(token) == 6 and token.startswith("<0x"):
            table[number] = bytes.fromhex(token[3:5])
        else:
            table[number] = token.replace("\u2581", " ").encode()
    return tuple(table)
