"""What turns text into ids: bytes, tiktoken, or the `tokenizers` library. tokenizer.py chooses among them.

tiktoken and tokenizers are imported where they are used: a plan asks for a vocabulary alone and must answer at once.
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

MOST_LITERALS = 64  # special tokens whose names are tried when a tokenizer is opened; every text is checked anyway
LONGEST_SPACE = 50_000  # tiktoken's regular expressions run out of stack between 400,000 and 1,000,000 white spaces
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
    """Texts to ids and back."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of the texts, and what was lost."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""


class BytesBackend:
    """Ids are the bytes of UTF-8."""

    def __init__(self, table: Sequence[bytes]) -> None:
        """Args: the bytes of every id, special tokens included."""
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
    """A converted byte-level BPE. A text that tiktoken cannot stomach goes to the `tokenizers` library.

    Inside, a number below the count of ranks is a rank of tiktoken's; a larger one is an id, shifted by that count.
    """

    def __init__(self, conversion: TiktokenSpec, table: Sequence[bytes], exact: Callable[[], TokenizerBackend]) -> None:
        """Args: the conversion; the bytes of every id; a way to the engine that can do everything, slowly.

        Raises:
            CannotConvertError: tiktoken does not know the pattern's dialect.
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
        self._bytes_of = np.zeros(len(self._id_of), dtype=np.int64)  # only what tiktoken made is counted
        self._bytes_of[: self._offset] = [len(token) for token in conversion.ranks]
        self._nfc = conversion.nfc
        self._raw, self._normal = _Cutter(conversion.raw_tokens), _Cutter(conversion.normal_tokens)
        self._table = table
        self._exact = exact

    def encode(self, texts: Sequence[str]) -> Encoded:
        """See TokenizerBackend.

        Raises:
            DataError: a text cannot be done by tiktoken, and `tokenizers` is not installed.
        """
        numbers: list[int] = []
        lengths = []
        utf8_bytes = 0
        for text in texts:
            before = len(numbers)
            if _has_long_space(text):
                numbers += (self._exact().encode([text]).ids + self._offset).tolist()
            else:
                utf8_bytes += self._append(text, numbers)
            lengths.append(len(numbers) - before)
        array = np.array(numbers, dtype=np.int64)
        if int(self._bytes_of[array].sum()) != utf8_bytes:
            return self._exact().encode(texts)  # the pattern leaves gaps, which tiktoken drops and `tokenizers` keeps
        return Encoded(self._id_of[array], np.array(lengths, dtype=np.int64), {})

    def decode(self, ids: Sequence[int]) -> str:
        """See TokenizerBackend."""
        return _join(self._table, ids)

    def _append(self, text: str, numbers: list[int]) -> int:
        """Append the numbers of a text; return the bytes of UTF-8 that tiktoken was given."""
        utf8_bytes = 0
        for part in self._raw.cut(text):
            if isinstance(part, int):
                numbers.append(part + self._offset)
                continue
            for piece in self._normal.cut(self._normalised(part)):
                if isinstance(piece, int):
                    numbers.append(piece + self._offset)
                else:
                    utf8_bytes += len(piece) if piece.isascii() else len(piece.encode())
                    numbers += self._tiktoken.encode_ordinary(piece)
        return utf8_bytes

    def _normalised(self, text: str) -> str:
        if not self._nfc or text.isascii() or unicodedata.is_normalized("NFC", text):
            return text
        return unicodedata.normalize("NFC", text)


def best_backend(
    spec: dict[str, Any], name: str, guarded: GuardedSpec, table: Sequence[bytes]
) -> tuple[TokenizerBackend, str | None]:
    """Return tiktoken where it gives the file's own tokens, otherwise the `tokenizers` library and a note that says so.

    Where the library is installed, it is compared with the file, token by token, and with tiktoken on a battery of
    awkward texts. No engine may give a special token's id for the token's name in a text.

    Args:
        spec: the content of the tokenizer.json.
        name: its path, for messages.
        guarded: the same with special tokens that no text becomes.
        table: the bytes of every id.

    Raises:
        DataError: the `tokenizers` library is needed and is not installed, does not accept the file, or numbers its
            tokens otherwise; or a text becomes a special token.
    """

    @functools.cache
    def exact() -> HuggingFaceBackend:
        return HuggingFaceBackend(spec, name, guarded, table)

    engine, note = _best(guarded, name, table, exact)
    _check_literals(engine, guarded, name)
    return engine, note


def _best(
    guarded: GuardedSpec, name: str, table: Sequence[bytes], exact: Callable[[], HuggingFaceBackend]
) -> tuple[TokenizerBackend, str | None]:
    """tiktoken if it can be used, otherwise the exact engine and the reason."""
    try:
        engine = TiktokenBackend(to_tiktoken(guarded.spec), table, exact)
        if importlib.util.find_spec("tokenizers"):
            _compare(engine, exact(), guarded)
    except CannotConvertError as reason:
        return exact(), f"{name}: uses the `tokenizers` library, about half as fast as tiktoken: {reason}"
    return engine, None


def _compare(engine: TokenizerBackend, exact: TokenizerBackend, guarded: GuardedSpec) -> None:
    """Raise CannotConvertError at the first text of the battery on which two engines differ."""
    for text in (*TOKENIZER_TEST_STRINGS, *literals([*guarded.names][:MOST_LITERALS])):
        found, expected = engine.encode([text]).ids.tolist(), exact.encode([text]).ids.tolist()
        if found != expected:
            raise CannotConvertError(f"tiktoken gives {found} for {text!r}, and the file means {expected}")


def _check_literals(engine: TokenizerBackend, guarded: GuardedSpec, name: str) -> None:
    """Raise DataError if the name of a special token in a text becomes the token."""
    forbidden = {number: token for token, number in guarded.names.items() if number != guarded.unknown_id}
    for text in literals([*guarded.names][:MOST_LITERALS]):
        for number in engine.encode([text]).ids.tolist():
            if number in forbidden:
                raise DataError(f"{name}: the text {text!r} becomes the special token {forbidden[number]!r}")


class _Cutter:
    """Cuts text at added tokens as the `tokenizers` library does: the leftmost first, of these the longest."""

    def __init__(self, tokens: Mapping[str, int | None]) -> None:
        self._tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        self._regex = re.compile("|".join(map(re.escape, longest_first))) if tokens else None

    def cut(self, text: str) -> Iterator[str | int]:
        """Yield pieces of text, and ids in place of added tokens; special ones are no more than text."""
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


def _has_long_space(text: str) -> bool:
    """Whether a run of white space may overflow tiktoken's stack: looks for a whole block of it."""
    blocks = range(0, len(text) - LONGEST_SPACE + 1, LONGEST_SPACE)
    return any(text[start : start + LONGEST_SPACE].isspace() for start in blocks)


def _join(table: Sequence[bytes], ids: Sequence[int]) -> str:
    return b"".join(table[number] for number in ids).decode("utf-8", errors="replace")
