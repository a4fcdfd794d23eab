"""Tokenizer backends: bytes, gigatoken and the `tokenizers` library; `best_backend` chooses one for a tokenizer.json.

gigatoken and tokenizers are imported inside functions, so that a plan, which needs only the vocabulary size, starts
quickly.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from titan_cpt.common.forked import begin_forked
from titan_cpt.data.tokenizer.check_texts import TOKENIZER_TEST_STRINGS, texts_in_every_script
from titan_cpt.data.tokenizer.encoded import Encoded, joined
from titan_cpt.data.tokenizer.gigatoken_backend import GigatokenBackend
from titan_cpt.data.tokenizer.gigatoken_spec import UnsupportedTokenizerError
from titan_cpt.data.tokenizer.huggingface_backend import HuggingFaceBackend, excerpt
from titan_cpt.data.tokenizer.special_tokens import GuardedSpec, literals
from titan_cpt.errors import DataError

MAX_TESTED_TOKENS = 64  # special and other added tokens, whose names are encoded as a test; every text is checked later


class TokenizerBackend(Protocol):
    """Encodes texts to ids and decodes ids to text."""

    def encode(
        self,
        texts: Sequence[str],
        *,
        utf8: Sequence[bytes] | None = None,
        begin: Sequence[int] = (),
        end: Sequence[int] = (),
    ) -> Encoded:
        """Return the ids of the texts, and the characters that were lost.

        Args:
            texts: the texts.
            utf8: the same texts in UTF-8, if the caller has them.
            begin: ids before each text.
            end: ids after each text.

        Raises:
            UnicodeEncodeError: a text contains half of a surrogate pair.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD."""


class BytesBackend:
    """Ids are UTF-8 bytes."""

    def __init__(self, table: Sequence[bytes]) -> None:
        """Set the bytes of every id, special tokens included."""
        self._table = table

    def encode(
        self,
        texts: Sequence[str],
        *,
        utf8: Sequence[bytes] | None = None,
        begin: Sequence[int] = (),
        end: Sequence[int] = (),
    ) -> Encoded:
        """See TokenizerBackend."""
        encoded = [text.encode() for text in texts] if utf8 is None else utf8
        parts = [[np.frombuffer(text, dtype=np.uint8)] for text in encoded]
        return joined(parts, np.uint16, begin=begin, end=end)

    def decode(self, ids: Sequence[int]) -> str:
        """See TokenizerBackend."""
        return b"".join(self._table[number] for number in ids).decode("utf-8", errors="replace")


def best_backend(
    spec: dict[str, Any], name: str, guarded: GuardedSpec, table: Sequence[bytes]
) -> tuple[TokenizerBackend, str | None]:
    """Return the gigatoken backend if it gives exactly the file's tokens, otherwise `tokenizers` and the reason.

    If the `tokenizers` library is installed, its ids are compared with the file, token by token, and with gigatoken on
    TOKENIZER_TEST_STRINGS. No backend may encode the name of a special token in a text as that token.

    Args:
        spec: content of the tokenizer.json.
        name: path of the tokenizer.json, for messages.
        guarded: the same content, changed so that no text becomes a special token.
        table: the bytes of every id.

    Raises:
        DataError: the `tokenizers` library is needed but not installed, rejects the file, or gives its tokens other
            ids; or a text becomes a special token.
    """

    @functools.cache
    def exact() -> HuggingFaceBackend:
        return HuggingFaceBackend(spec, name, guarded, table)

    return _best(guarded, name, table, exact)


def _best(
    guarded: GuardedSpec, name: str, table: Sequence[bytes], exact: Callable[[], HuggingFaceBackend]
) -> tuple[TokenizerBackend, str | None]:
    """Return the gigatoken backend if it can be used, otherwise the `tokenizers` backend and the reason."""
    added = [token["content"] for token in guarded.spec.get("added_tokens") or []]
    names = [*guarded.names][:MAX_TESTED_TOKENS] + added[:MAX_TESTED_TOKENS]
    texts = [*TOKENIZER_TEST_STRINGS, *texts_in_every_script(), *literals(names)]
    compared = importlib.util.find_spec("tokenizers") is not None
    # The two libraries take equally long to open: where possible, at the same time.
    answers = begin_forked(lambda: _Answers(exact(), texts)) if compared else None
    try:
        backend = GigatokenBackend(guarded, table, exact)
        if answers is not None:
            known = answers()
            backend.fallback = lambda: known  # most processes never need the library itself
            _compare(backend, texts, known)
        _check_literals(backend, guarded, name)
        backend.fallback = exact
    except UnsupportedTokenizerError as reason:
        _check_literals(exact(), guarded, name)
        return exact(), f"{name}: uses the `tokenizers` library, many times slower than gigatoken: {reason}"
    note = f"{name}: its ids were not compared with the `tokenizers` library, which is not installed"
    return backend, None if compared else note


class _Answers:
    """What the `tokenizers` library gives for some texts; takes its place while they are compared."""

    def __init__(self, library: HuggingFaceBackend, texts: Sequence[str]) -> None:
        self._normalized = {text: library.normalized(text) for text in texts}
        self._encoded = {text: library.encode([text]) for text in {*texts, *self._normalized.values()}}

    def encode(self, texts: Sequence[str]) -> Encoded:
        (text,) = texts
        return self._encoded[text]

    def normalized(self, text: str) -> str:
        return self._normalized[text]


def _compare(backend: TokenizerBackend, texts: Sequence[str], expected: _Answers) -> None:
    """Raise UnsupportedTokenizerError for the first test string whose ids differ from those of the library."""
    for text in texts:
        found = backend.encode([text]).ids.tolist()
        ids = expected.encode([text]).ids.tolist()
        if found != ids:
            first = next((n for n, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), 0)
            raise UnsupportedTokenizerError(
                f"gigatoken encodes {excerpt(text)} as {found[first : first + 4]}, the file defines "
                f"{ids[first : first + 4]}"
            )


def _check_literals(backend: TokenizerBackend, guarded: GuardedSpec, name: str) -> None:
    """Raise DataError if the name of a special token in a text becomes that token."""
    forbidden = {number: token for token, number in guarded.names.items() if number != guarded.unknown_id}
    for text in literals([*guarded.names][:MAX_TESTED_TOKENS]):
        for number in backend.encode([text]).ids.tolist():
            if number in forbidden:
                raise DataError(f"{name}: the text {text!r} becomes the special token {forbidden[number]!r}")
