"""Tokenizer backends: bytes, tiktoken and the `tokenizers` library; `best_backend` chooses one for a tokenizer.json.

tiktoken and tokenizers are imported inside functions, so that a plan, which needs only the vocabulary size, starts
quickly.
"""

import functools
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from titan_cpt.data.tokenizer.huggingface_backend import Encoded, HuggingFaceBackend
from titan_cpt.data.tokenizer.special_tokens import GuardedSpec, literals
from titan_cpt.data.tokenizer.tiktoken_bpe import CannotConvertError, TiktokenSpec, to_tiktoken
from titan_cpt.errors import DataError

MAX_TESTED_SPECIAL_TOKENS = 64  # names to encode as a test when a tokenizer is opened; every text is checked later
LONGEST_WHITE_SPACE = 50_000  # tiktoken's regular expressions overflow the stack at 400,000 to 1,000,000 white spaces
TOKENIZER_TEST_STRINGS = (
    *("", " ", "  ", "   ", "a", " a", "  a", "a ", "a  ", "a\nb", "a\n\nb", "a \n b", "a\n  b", "\n\n\n", "\t\tx\t "),
    *(
        "\r\n",
        "a\r\n\r\n  b",
        " \n  \n   x",
        "\x00\x01\x1c\x1f\x7f",
        "=" * 40 + "-" * 41 + "\n" * 7,
        "a" * 17 + "ab" * 9,
    ),
    *(f"x{' ' * k}y\n{' ' * k}z{' ' * k}" for k in (*range(4, 27), 48, 49, 50)),
    *("it's we'll I'M YOU'RE they'Ve 'tis ''", "don\u2019t", "\u017fs '\u017f K\u212a"),
    *(
        "1 12 123 1234 1234567 3.14 1,000 \u0664\u0665 \u2167 \u00bd",
        "snake_case camelCase x=[1,2];// \u20ac5 -- ... !",
    ),
    *("a.b@c.de https://x.y/z?a=1&b=%20", "Stra\u00dfe \u00e4\u00f6\u00fc \u00c4\u00d6\u00dc na\u00efve"),
    *("a\u0308o\u0323\u0302 e\u0301 \u0301x \u1e69 s\u0323\u0307 s\u0307\u0323 \u212b\u2126", "\u1112\u1161\u11ab"),
    *(
        "\u4e2d\u6587\uff0c\u5b57\u7b26\u3002 \u65e5\u672c\u8a9e\u3067\u3059 \ud55c\uad6d",
        "\u0645\u0631\u062d\u0628\u0627",
    ),
    *("\u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947", "\U00010348\U0001d4d0\U0010ffff"),
    *("\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",),
    *(
        "\u00a0\u00a0x\u2003\u3000y\u200b\ufeffz\u0085\u2028\u2029",
        "a <|endoftext|>b</s><s>",
        "<|padding|>  <|endoftext|>",
    ),
)


class TokenizerBackend(Protocol):
    """Encodes texts to ids and decodes ids to text."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the ids of the texts, and the characters that were lost."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD."""


class BytesBackend:
    """Ids are UTF-8 bytes."""

    def __init__(self, table: Sequence[bytes]) -> None:
        """Set the bytes of every id, special tokens included."""
        self._table = table

    def encode(self, texts: Sequence[str]) -> Encoded:
        """See TokenizerBackend."""
        encoded = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.int64)
        return Encoded(ids, np.array([len(text) for text in encoded], dtype=np.int64), {})

    def decode(self, ids: Sequence[int]) -> str:
        """See TokenizerBackend."""
        return _join(self._table, ids)


class TiktokenBackend:
    """A byte-level BPE that was converted to tiktoken, with a fallback for texts that tiktoken cannot encode.

    Internally, a code below the number of ranks is a tiktoken rank; a larger code is an id plus the number of ranks.
    """

    def __init__(
        self, conversion: TiktokenSpec, table: Sequence[bytes], fallback: Callable[[], TokenizerBackend]
    ) -> None:
        """Build the tiktoken encoding.

        Args:
            conversion: the tokenizer in tiktoken's terms.
            table: the bytes of every id.
            fallback: returns the `tokenizers` backend, which is slower and encodes every text.

        Raises:
            CannotConvertError: tiktoken does not support the regular expression.
        """
        import tiktoken

        try:
            self._tiktoken = tiktoken.Encoding(
                "titan_cpt", pat_str=conversion.pattern, mergeable_ranks=conversion.ranks, special_tokens={}
            )
        except ValueError as fault:
            raise CannotConvertError(f"tiktoken refuses its pattern: {fault}") from fault
        self._offset = len(conversion.ids)
        self._id_of = np.concatenate((conversion.ids, np.arange(len(table), dtype=np.int64)))
        self._bytes_of = np.zeros(len(self._id_of), dtype=np.int64)  # 0 for ids that tiktoken does not produce
        self._bytes_of[: self._offset] = [len(token) for token in conversion.ranks]
        self._nfc = conversion.nfc
        self._raw = _AddedTokenSplitter(conversion.raw_tokens)
        self._normal = _AddedTokenSplitter(conversion.normal_tokens)
        self._table = table
        self._fallback = fallback

    def encode(self, texts: Sequence[str]) -> Encoded:
        """See TokenizerBackend.

        Raises:
            DataError: tiktoken cannot encode a text, and `tokenizers` is not installed.
        """
        codes: list[int] = []
        lengths = []
        utf8_bytes = 0
        for text in texts:
            before = len(codes)
            if _has_long_white_space(text):
                codes += (self._fallback().encode([text]).ids + self._offset).tolist()
            else:
                utf8_bytes += self._append(text, codes)
            lengths.append(len(codes) - before)
        array = np.array(codes, dtype=np.int64)
        if int(self._bytes_of[array].sum()) != utf8_bytes:
            # tiktoken drops text that the pattern does not match; `tokenizers` keeps it.
            return self._fallback().encode(texts)
        return Encoded(self._id_of[array], np.array(lengths, dtype=np.int64), {})

    def decode(self, ids: Sequence[int]) -> str:
        """See TokenizerBackend."""
        return _join(self._table, ids)

    def _append(self, text: str, codes: list[int]) -> int:
        """Append the codes of a text; return the number of UTF-8 bytes that tiktoken encoded."""
        utf8_bytes = 0
        for part in self._raw.split(text):
            if isinstance(part, int):
                codes.append(part + self._offset)
                continue
            for piece in self._normal.split(self._normalized(part)):
                if isinstance(piece, int):
                    codes.append(piece + self._offset)
                else:
                    utf8_bytes += len(piece) if piece.isascii() else len(piece.encode())
                    codes += self._tiktoken.encode_ordinary(piece)
        return utf8_bytes

    def _normalized(self, text: str) -> str:
        if not self._nfc or text.isascii() or unicodedata.is_normalized("NFC", text):
            return text
        return unicodedata.normalize("NFC", text)


def best_backend(
    spec: dict[str, Any], name: str, guarded: GuardedSpec, table: Sequence[bytes]
) -> tuple[TokenizerBackend, str | None]:
    """Return the tiktoken backend if it gives exactly the file's tokens, otherwise `tokenizers` and the reason.

    If the `tokenizers` library is installed, its ids are compared with the file, token by token, and with tiktoken on
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

    backend, note = _best(guarded, name, table, exact)
    _check_literals(backend, guarded, name)
    return backend, note


def _best(
    guarded: GuardedSpec, name: str, table: Sequence[bytes], exact: Callable[[], HuggingFaceBackend]
) -> tuple[TokenizerBackend, str | None]:
    """Return the tiktoken backend if it can be used, otherwise the `tokenizers` backend and the reason."""
    try:
        backend = TiktokenBackend(to_tiktoken(guarded.spec), table, exact)
        if importlib.util.find_spec("tokenizers"):
            _compare(backend, exact(), guarded)
    except CannotConvertError as reason:
        return exact(), f"{name}: uses the `tokenizers` library, about half as fast as tiktoken: {reason}"
    return backend, None


def _compare(backend: TokenizerBackend, exact: TokenizerBackend, guarded: GuardedSpec) -> None:
    """Raise CannotConvertError for the first test string that the two backends encode differently."""
    for text in (*TOKENIZER_TEST_STRINGS, *literals([*guarded.names][:MAX_TESTED_SPECIAL_TOKENS])):
        found = backend.encode([text]).ids.tolist()
        expected = exact.encode([text]).ids.tolist()
        if found != expected:
            raise CannotConvertError(f"tiktoken encodes {text!r} as {found}, the file defines {expected}")


def _check_literals(backend: TokenizerBackend, guarded: GuardedSpec, name: str) -> None:
    """Raise DataError if the name of a special token in a text becomes that token."""
    forbidden = {number: token for token, number in guarded.names.items() if number != guarded.unknown_id}
    for text in literals([*guarded.names][:MAX_TESTED_SPECIAL_TOKENS]):
        for number in backend.encode([text]).ids.tolist():
            if number in forbidden:
                raise DataError(f"{name}: the text {text!r} becomes the special token {forbidden[number]!r}")


class _AddedTokenSplitter:
    """Splits text at added tokens as the `tokenizers` library does: leftmost match first, then the longest."""

    def __init__(self, tokens: Mapping[str, int | None]) -> None:
        self._tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        self._regex = re.compile("|".join(map(re.escape, longest_first))) if tokens else None

    def split(self, text: str) -> Iterator[str | int]:
        """Yield pieces of text, and the ids of added tokens between them; names of special tokens remain text."""
        if self._regex is None:
            yield text
            return
        start = 0
        for match in self._regex.finditer(text):
            number = self._tokens[match.group()]
            if number is not None:
                yield text[start : match.start()]
                yield number
                start = match.end()
        yield text[start:]


def _has_long_white_space(text: str) -> bool:
    """Whether white space may overflow tiktoken's stack; true if an aligned block is nothing else."""
    blocks = range(0, len(text) - LONGEST_WHITE_SPACE + 1, LONGEST_WHITE_SPACE)
    return any(text[start : start + LONGEST_WHITE_SPACE].isspace() for start in blocks)


def _join(table: Sequence[bytes], ids: Sequence[int]) -> str:
    return b"".join(table[number] for number in ids).decode("utf-8", errors="replace")
