"""Text to token ids and back: bytes, or a tokenizer.json, through tiktoken wherever that gives the file's own tokens.

A name of a special token that occurs in a text, such as a literal <|endoftext|>, is text like any other: only
`encode_documents` puts the end-of-document id into a stream.

Opening a tokenizer reads its file; the library that does the work is loaded with the first text. The normal form C
is Python's: some hundred combining marks that came to Unicode after version 9 may be put into another order than by
the `tokenizers` library, whose tables are older.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from titan_cpt.data.tokenizer.backends import BytesBackend, TokenizerBackend, best_backend
from titan_cpt.data.tokenizer.huggingface_backend import Encoded, Ids
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
from titan_cpt.data.tokenizer.tiktoken_bpe import token_bytes
from titan_cpt.errors import DataError

BYTES = "bytes"
END_OF_DOCUMENT = "<|endoftext|>"
_IDS = 1 << 24  # more than any vocabulary has; a table of all ids is made


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary, and the way from text into it and back."""

    name: str
    """"bytes", or the path of the tokenizer.json."""
    fingerprint: str
    """SHA-256 of the file's content: two tokenizers of one fingerprint give the same ids."""
    vocab_size: int
    """Ids lie in [0, vocab_size); some of them may be unused."""
    eod_id: int
    """Stands at the end of every document."""
    bos: BosToken | None
    """What may stand at the begin of every document; None where the vocabulary has no such token."""
    _table: tuple[bytes, ...]
    _special_ids: frozenset[int]
    _spec: dict[str, Any] | None
    _guarded: GuardedSpec | None
    add_bos: bool = False
    """Documents and prompts begin with the begin-of-document token."""

    @property
    def note(self) -> str | None:
        """What the user should know about speed, or None. Loads the library that does the work."""
        return self._engine[1]

    @property
    def adds_bos_itself(self) -> bool:
        """Whether the file's post-processor, and so transformers, puts a token before each text."""
        return self.bos is not None and self.bos.added

    @property
    def bos_id(self) -> int | None:
        """The begin-of-document id, if documents begin with one."""
        return self.bos.ids[0] if self.bos is not None and self.add_bos else None

    def with_bos(self, add_bos: bool) -> "Tokenizer":
        """The same tokenizer, whose documents and prompts begin with the begin-of-document token, or do not.

        Raises:
            DataError: it has no such token, or puts several tokens before a text.
        """
        if add_bos == self.add_bos:
            return self
        if add_bos and self.bos is None:
            raise DataError(
                f"{self.name}: has no begin-of-document token: its post-processor adds none, and its vocabulary has "
                f"none of {', '.join(BEGIN_NAMES)}. Leave --add-bos and tokenizer.add_bos out"
            )
        if add_bos and self.bos is not None and len(self.bos.ids) > 1:
            raise DataError(
                f"{self.name}: its post-processor puts {len(self.bos.ids)} tokens before a text ({self.bos.name}); "
                "one can be added here. Leave --add-bos and tokenizer.add_bos out"
            )
        if add_bos and self.bos is not None:
            (number,) = self.bos.ids
            if number not in range(self.vocab_size) or self._table[number] != self.bos.name.encode():
                raise DataError(
                    f"{self.name}: its post-processor gives {self.bos.name} the id {number}, which its vocabulary "
                    "does not: get the file again"
                )
        return replace(self, add_bos=add_bos)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a document's beginning: as `encode`, behind the begin-of-document id if there is one."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without the end-of-document id.

        Raises:
            DataError: the text holds half of a surrogate pair, or needs a library that is not installed.
        """
        ids: list[int] = self._encode([text]).ids.tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; see encode."""
        ids, lengths, _ = self._encode(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []

    def encode_documents(self, texts: Sequence[str]) -> Encoded:
        """Return the ids of all texts one behind another, each with its begin and end ids, and their lengths.

        Raises:
            DataError: see encode.
        """
        ids, lengths, lost = self._encode(texts)
        ends = np.cumsum(lengths)
        if self.bos_id is None:
            return Encoded(np.insert(ids, ends, self.eod_id), lengths + 1, lost)
        places = np.stack([ends - lengths, ends], axis=1).ravel()  # of equal places, the first one listed comes first
        marks = np.tile([self.bos_id, self.eod_id], len(ends))
        return Encoded(np.insert(ids, places, marks), lengths + 2, lost)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by their names; bytes that are no UTF-8 become U+FFFD.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        for number in ids:
            if not 0 <= number < self.vocab_size:
                raise DataError(f"{self.name}: id {number}; allowed are ids from 0 to {self.vocab_size - 1}")
        return self._engine[0].decode(ids)

    def token_byte_lengths(self) -> Ids:
        """Return the bytes of UTF-8 that each id stands for, 0 for special tokens: the measure for bits per byte."""
        lengths = np.array([len(token) for token in self._table], dtype=np.int64)
        lengths[list(self._special_ids)] = 0
        return lengths

    @functools.cached_property
    def _engine(self) -> tuple[TokenizerBackend, str | None]:
        if self._spec is None or self._guarded is None:
            return BytesBackend(self._table), None
        with _understood(self.name):
            return best_backend(self._spec, self.name, self._guarded, self._table)

    def _encode(self, texts: Sequence[str]) -> Encoded:
        try:
            return self._engine[0].encode(texts)
        except UnicodeEncodeError as fault:
            raise DataError(
                f"a text holds {fault.object[fault.start]!r}, half of a surrogate pair, which is no character"
            ) from fault


def load_tokenizer(path: str) -> Tokenizer:
    """Open a tokenizer.

    Args:
        path: "bytes" (ids 0 to 255 are bytes, 256 the end of a document), a tokenizer.json, or a folder that holds one.

    Raises:
        DataError: the file is missing, is no tokenizer.json, or has no token for the end of a document.
    """
    if path == BYTES:
        table = (*(bytes([byte]) for byte in range(256)), END_OF_DOCUMENT.encode())
        return Tokenizer(BYTES, fingerprint_of(BYTES), len(table), 256, None, table, frozenset({256}), None, None)
    content, spec = _read(path)
    with _understood(path):
        added = spec.get("added_tokens") or []
        numbers = _numbers(path, spec)
        eod = _end_of_document(path, spec, numbers)
        bos = find_bos_token(spec, numbers)
        # A token that ends or begins documents is not made from its name in a text, whatever the file calls it.
        marks = {eod, bos.name if bos else eod}
        safe = [{**token, "special": True} if token["content"] in marks else token for token in added]
        spec = {**spec, "added_tokens": safe}
        if spec["model"].get("dropout"):  # meant for the training of other models: a text has other ids at each try
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
    """Return the vocabulary size (largest id + 1, added tokens included) from the file alone, in milliseconds.

    Raises:
        DataError: the file is missing or is no tokenizer.json.
    """
    if path == BYTES:
        return 257
    with _understood(path):
        return max(_numbers(path, _read(path)[1]).values()) + 1


def fingerprint_of(path: str) -> str:
    """Return the tokenizer's fingerprint from the file alone, in milliseconds.

    Raises:
        DataError: the file is missing or is no tokenizer.json.
    """
    return hashlib.sha256(b"titan_cpt bytes 1" if path == BYTES else _read(path)[0]).hexdigest()


@contextmanager
def _understood(path: str) -> Iterator[None]:
    """For what a tokenizer.json is taken apart in: one that is built otherwise than all others is an error of its."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as fault:
        raise DataError(
            f"{path}: is no tokenizer.json of the usual build ({type(fault).__name__}: {fault}); get the file again"
        ) from fault


def _read(path: str) -> tuple[bytes, dict[str, Any]]:
    """Content of a tokenizer.json, raw and parsed."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        content = file.read_bytes()
    except OSError as fault:
        raise DataError(
            f"{file}: {fault.strerror}; a tokenizer is {BYTES!r}, a tokenizer.json, or a folder that holds one"
        ) from fault
    try:
        spec = json.loads(content)
    except (ValueError, RecursionError) as fault:
        raise DataError(f"{file}: is not JSON ({fault}); a tokenizer.json is wanted, not a tokenizer.model") from fault
    model = spec.get("model") if isinstance(spec, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not vocab or not isinstance(vocab, dict | list):
        raise DataError(f"{file}: has no model.vocab; allowed is a tokenizer.json of the `tokenizers` library")
    return content, spec


def _numbers(path: str, spec: dict[str, Any]) -> dict[str, int]:
    """Token to id, added tokens included."""
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    numbers = {**model_vocab(spec["model"]), **added}
    for token, number in numbers.items():
        if type(number) is not int or not 0 <= number < _IDS:
            raise ValueError(f"the id of {token!r} must be an integer from 0 to {_IDS - 1}, got {number!r}")
    check_added_tokens(path, spec)
    return numbers


def _end_of_document(path: str, spec: dict[str, Any], numbers: dict[str, int]) -> str:
    """The usual name that the vocabulary has, those before others that the file declares as special."""
    name = usual_name(END_NAMES, spec, numbers)
    if name is not None:
        return name
    added = spec.get("added_tokens") or []
    special = ", ".join(repr(token["content"]) for token in added if token.get("special")) or "none"
    raise DataError(
        f"{path}: no token for the end of a document; wanted is one of {', '.join(END_NAMES)}, its special tokens are: "
        f"{special}. Add one of these names to its added_tokens"
    )


def _byte_table(spec: dict[str, Any], numbers: dict[str, int]) -> tuple[bytes, ...]:
    """The bytes that each id stands for; special tokens by name, b"" for an id without token."""
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
