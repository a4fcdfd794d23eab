"""The gigatoken backend: byte-level BPE, tens of times as fast as the `tokenizers` library, with the same ids.

gigatoken is imported inside functions, so that a plan, which needs only the vocabulary size, starts quickly.

Three checks for each text keep the ids those of the `tokenizers` library, which encodes the text where one fails:
the ids must have as many bytes as the text; a character that is not in both libraries' Unicode tables may be split
otherwise; and a text with the name of a special token that could hide an added token is not given to gigatoken.
"""

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from titan_cpt.data.tokenizer.encoded import Encoded, Ids, id_dtype, joined
from titan_cpt.data.tokenizer.gigatoken_spec import GigatokenSpec, UnsupportedTokenizerError, to_gigatoken
from titan_cpt.data.tokenizer.special_tokens import GuardedSpec

PIECE_CHARACTERS = 1 << 20  # longer texts are cut, so that a text of 50 MB does not need several times its size
_CUT = re.compile(r"\x20(?<=[^\W\d_]\x20)(?=[^\W\d_])|\n(?<=[^\s\x1c-\x1f]\n)(?=[^\W\d_])")
"""A single space between letters, or a single line end between text and a letter. Every pattern of gigatoken starts a
new piece before the space and after the line end, and the left part has the same pieces if the text ends there."""
_CACHE_CHECK_BYTES = 16 << 20  # of text; gigatoken caches each distinct word, without a limit
_CACHE_LIMIT_BYTES = 256 << 20
# Letters and digits of Unicode 17, which gigatoken 0.10 knows and `tokenizers` 0.23 does not, as (first, last).
# `scripts/fuzz_tokenizers.py --characters` compares the two libraries on every character.
_UNICODE_17 = (
    *((0x088F, 0x088F), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0xA7CE, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959)),
    *((0x10EC5, 0x10EFB), (0x11B60, 0x11B67), (0x11DB0, 0x11DE9), (0x16EA0, 0x16ED3), (0x16FF2, 0x16FF6)),
    *((0x187F8, 0x187FF), (0x18D09, 0x18DF2), (0x1E6C0, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD)),
    *((0x323B0, 0x33479),),
)


class ExactLibrary(Protocol):
    """The `tokenizers` library, as far as GigatokenBackend uses it."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the ids of the texts."""

    def normalized(self, text: str) -> str:
        """Return the text after the file's normalizer."""


class GigatokenBackend:
    """A byte-level BPE in gigatoken, with the `tokenizers` library for texts that gigatoken may encode otherwise."""

    def __init__(self, guarded: GuardedSpec, table: Sequence[bytes], fallback: Callable[[], ExactLibrary]) -> None:
        """Build the encoder.

        Args:
            guarded: content of the tokenizer.json, changed so that no text becomes a special token.
            table: the bytes of every id.
            fallback: returns the `tokenizers` backend, which is slower and encodes every text.

        Raises:
            UnsupportedTokenizerError: gigatoken does not support the file.
        """
        spec = to_gigatoken(guarded.spec)
        self._spec = spec
        self._table = table
        self.fallback = fallback
        self._bytes_of = _byte_lengths(table, spec, guarded)
        self._dtype = id_dtype(len(table))
        self._hiding = [name.encode() for name in spec.hiding_names]
        self._encoder = _encoder(spec)
        self._bytes_since_check = 0
        self._resident_bytes = _resident_bytes()

    def encode(
        self,
        texts: Sequence[str],
        *,
        utf8: Sequence[bytes] | None = None,
        begin: Sequence[int] = (),
        end: Sequence[int] = (),
    ) -> Encoded:
        """See TokenizerBackend.

        Raises:
            DataError: gigatoken cannot encode a text, and `tokenizers` is not installed.
        """
        parts: list[list[Ids]] = []
        for number, text in enumerate(texts):
            if len(text) > PIECE_CHARACTERS and self._spec.may_cut:
                parts.append([self._ids(piece, piece.encode()) for piece in pieces(text)])
            else:
                parts.append([self._ids(text, text.encode() if utf8 is None else utf8[number])])
        return joined(parts, self._dtype, begin=begin, end=end)

    def encode_pieces(self, parts: Iterable[str], *, begin: Sequence[int] = (), end: Sequence[int] = ()) -> Encoded:
        """The same for one text, given in parts."""
        if not self._spec.may_cut:
            return self.encode(["".join(parts)], begin=begin, end=end)
        ids = [self._ids(piece, piece.encode()) for piece in _cut_again(parts)]
        return joined([ids], self._dtype, begin=begin, end=end)

    def decode(self, ids: Sequence[int]) -> str:
        """See TokenizerBackend."""
        return b"".join(self._table[number] for number in ids).decode("utf-8", errors="replace")

    def _ids(self, text: str, utf8: bytes) -> Ids:
        """Return the ids of a text or piece."""
        if not (utf8.isascii() or is_common(utf8)):
            if self._spec.nfc and not unicodedata.is_normalized("NFC", text):
                if self._spec.raw_tokens:
                    return self._library_ids(text)
                text = self.fallback().normalized(text)
                utf8 = text.encode()
            if has_unsettled(text):
                return self._library_ids(text)
        if any(name in utf8 for name in self._hiding):
            return self._library_ids(text)
        ids = self._encoder.encode(utf8)
        if int(self._bytes_of.take(ids).sum()) != len(utf8):
            return self._library_ids(text)
        self._limit_cache(len(utf8))
        return np.asarray(ids, dtype=self._dtype)

    def _library_ids(self, text: str) -> Ids:
        return self.fallback().encode([text]).ids.astype(self._dtype)

    def _limit_cache(self, utf8_bytes: int) -> None:
        """Replace the encoder, and so its cache, when memory has grown: it would hold every distinct word."""
        self._bytes_since_check += utf8_bytes
        if self._bytes_since_check < _CACHE_CHECK_BYTES:
            return
        self._bytes_since_check = 0
        resident = _resident_bytes()
        if resident is None or self._resident_bytes is None or resident > self._resident_bytes + _CACHE_LIMIT_BYTES:
            self._encoder = None  # free it first
            self._encoder = _encoder(self._spec)
            self._resident_bytes = _resident_bytes()


def pieces(text: str) -> Iterator[str]:
    """Yield parts of a long text that have the same ids as the whole; a part without a place to cut is longer."""
    return _cut_again([text])


def _cut_again(parts: Iterable[str]) -> Iterator[str]:
    """The same for a text given in any parts, each of which is searched once."""
    held: list[str] = []
    characters = 0
    for part in parts:
        start = 0
        while cut := _next_cut(part, max(start + PIECE_CHARACTERS - characters, 0)):
            yield "".join((*held, part[start:cut]))
            held, characters, start = [], 0, cut
        held.append(part[start:])
        characters += len(held[-1])
    yield "".join(held)


def _next_cut(text: str, position: int) -> int:
    """Return the next place to cut a text; 0 if there is none."""
    found = _CUT.search(text, position)
    if found is None:
        return 0
    return found.start() if found.group() == " " else found.end()


def _encoder(spec: GigatokenSpec) -> Any:
    try:
        from gigatoken.gigatoken_rs import load_hf_json

        return load_hf_json(spec.content)
    except (KeyboardInterrupt, SystemExit, ModuleNotFoundError):  # an installation without gigatoken is incomplete
        raise
    except ImportError as fault:
        raise UnsupportedTokenizerError(f"gigatoken cannot be loaded: {fault}") from fault
    except BaseException as fault:  # the library raises nothing more specific, and a panic in Rust is no Exception
        reason = str(fault).split("\n")[0]
        raise UnsupportedTokenizerError(f"gigatoken refuses it: {reason}") from fault


def _byte_lengths(table: Sequence[bytes], spec: GigatokenSpec, guarded: GuardedSpec) -> npt.NDArray[np.uint32]:
    """Return the number of bytes that each id stands for in a text; 0 for special tokens, which no text contains."""
    lengths = np.array([len(token) for token in table], dtype=np.uint32)
    for number, content in spec.added.items():
        lengths[number] = len(content.encode())
    lengths[[number for number in guarded.names.values() if number >= 0]] = 0
    return lengths


def is_common(utf8: bytes) -> bool:
    """Whether all characters are below U+0300 or from U+2002 to U+203F, as in most European texts.

    Both libraries know them, and any sequence of them is in form NFC. No other check is needed, and this one is the
    fastest.
    """
    codes = np.frombuffer(utf8, dtype=np.uint8)
    leads = np.flatnonzero(codes >= 0xCC)  # of characters from U+0300 on
    three = codes.take((leads, leads + 1, leads + 2), mode="clip")
    return bool(((three[0] == 0xE2) & (three[1] == 0x80) & (three[2] >= 0x82)).all())


def has_unsettled(text: str) -> bool:
    """Whether a text has characters that the Unicode tables of gigatoken and `tokenizers` may not both have."""
    starts = range(0, len(text), PIECE_CHARACTERS)
    codes = (np.frombuffer(text[start : start + PIECE_CHARACTERS].encode("utf-32-le"), np.uint32) for start in starts)
    return any(_has_unsettled_code(block) for block in codes)


def _has_unsettled_code(codes: npt.NDArray[np.uint32]) -> bool:
    for page in np.flatnonzero(np.bincount(codes >> _PAGE_BITS)).tolist():
        if not _pages_filled[page]:
            _fill_page(page)
    return bool(_unsettled.take(codes).any())


_PAGE_BITS = 12
_unsettled = np.zeros(sys.maxunicode + 1, dtype=np.bool_)
"""For each code point whether the libraries' tables may differ; filled by pages, of which a text has few."""
_pages_filled = np.zeros(len(_unsettled) >> _PAGE_BITS, dtype=np.bool_)


def _fill_page(page: int) -> None:
    """Mark the code points of a page that Python's tables lack, except those for private use, and new ones."""
    codes = range(page << _PAGE_BITS, (page + 1) << _PAGE_BITS)
    if codes.start < 0xF0000:
        _unsettled[codes.start : codes.stop] = [unicodedata.category(chr(code)) == "Cn" for code in codes]
    for first, last in _UNICODE_17:
        _unsettled[max(first, codes.start) : max(min(last + 1, codes.stop), codes.start)] = True
    _pages_filled[page] = True


def _resident_bytes() -> int | None:
    """Return the resident memory of this process; None where Linux's /proc does not exist."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
