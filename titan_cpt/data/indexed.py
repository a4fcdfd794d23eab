"""Megatron's .bin/.idx pairs, read: the tokens of many documents one behind another, as one stream.

A training run needs the token stream alone, never the sequence borders: the index is checked on open and not kept.
Tokens are read with pread and not mapped, because a file that shrinks under a map kills the process (SIGBUS), while a
short read is an error with a name. The format stands in indexed_format.py, writing in indexed_writer.py.
"""

import glob
import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_cpt.data.indexed_format import (
    DAMAGED,
    check_index,
    check_pointers,
    checked_tokens,
    open_binary,
    pair_paths,
    read_exactly,
    read_head,
    read_header,
    size_and_mtime,
    spans,
)
from titan_cpt.errors import DataError

FULL_SCAN_TOKENS = 64_000_000  # up to this every token is compared with the vocabulary on open
OPEN_FILES = 64  # .bin files that one stream keeps open; the usual limit of a process is 1024


class IndexedTokens:
    """One .bin/.idx pair, checked on open, of which any window of tokens can be read.

    Attributes:
        prefix: the path without .bin and .idx.
        tokens, sequences: counts.
        dtype: the number type of the .bin.
        digest: SHA-256 over the header, both lengths, the head of the .idx and evenly spread blocks of the .bin.
    """

    def __init__(self, prefix: Path, *, vocab_size: int | None = None, scan_tokens: int = FULL_SCAN_TOKENS) -> None:
        """Open and check the pair.

        Args:
            prefix: the path without .bin and .idx.
            vocab_size: ids must lie in [0, vocab_size); None leaves that unchecked.
            scan_tokens: a pair of at most this many tokens has all its ids checked now, a larger one as many in evenly
                spread blocks; every window is checked when it is read in any case.

        Raises:
            DataError: a file is missing or damaged, the halves do not belong together, or an id is not in the
                vocabulary.
        """
        self.prefix = prefix
        self.vocab_size = vocab_size
        self._bin, idx = pair_paths(prefix)
        self._fd: int | None = None
        header = read_header(idx)
        self.dtype, self.sequences = header.dtype, header.sequences
        self._bytes, self._mtime_ns = size_and_mtime(self._bin)
        self.tokens = checked_tokens(self._bin, self._bytes, header)
        with open_binary(idx) as file:
            check_index(file.fileno(), idx, header, self._bytes)
            self.digest = self._content_digest(read_exactly(file.fileno(), 65_536, 0))
        if vocab_size is not None:
            for start, stop in spans(self.tokens, block=65_536, limit=scan_tokens):
                self.read(start, stop - start)
        self.close()

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return tokens [start, start + count) as int64.

        Raises:
            DataError: the file changed since it was opened, or an id of the window is not in the vocabulary.
        """
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"{self.prefix}: tokens [{start}, {start + count}) of {self.tokens}")
        fd = self._opened()
        data = read_exactly(fd, count * self.dtype.itemsize, start * self.dtype.itemsize)
        if len(data) != count * self.dtype.itemsize:
            raise DataError(f"{self._bin}: ended at a read of tokens [{start}, {start + count}): {DAMAGED}")
        window = np.frombuffer(data, self.dtype)
        if count and self.vocab_size is not None:
            self._check_vocabulary(window, start, self.vocab_size)
        return window.astype(np.int64)

    def close(self) -> None:
        """Close the .bin; the next read opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process gets the path and what was seen on open, never the file descriptor."""
        return {**self.__dict__, "_fd": None}

    def __del__(self) -> None:
        """Close the .bin with its last reader."""
        if getattr(self, "_fd", None) is not None:
            self.close()

    def _opened(self) -> int:
        """The open .bin, compared with what it was when its checks were made."""
        if self._fd is None:
            try:
                self._fd = os.open(self._bin, os.O_RDONLY)
            except OSError as fault:
                raise DataError(f"{self._bin}: cannot be opened again: {fault.strerror}") from fault
        status = os.fstat(self._fd)
        if status.st_size != self._bytes:
            raise DataError(
                f"{self._bin}: {status.st_size} bytes, and {self._bytes} when it was opened: something replaced it or "
                "cut it short under the running program. Restore it and start again; checkpoints are intact"
            )
        if status.st_mtime_ns != self._mtime_ns:
            self._mtime_ns = status.st_mtime_ns  # a touch or a copy of the same bytes is no harm
            if self._content_digest(read_head(pair_paths(self.prefix)[1])) != self.digest:
                raise DataError(
                    f"{self._bin}: was rewritten with other tokens under the running program. Restore it and start "
                    "again; checkpoints are intact"
                )
        return self._fd

    def _check_vocabulary(self, window: npt.NDArray[Any], start: int, vocab_size: int) -> None:
        """Raise DataError at the first id of a window that is not in [0, vocab_size)."""
        if int(window.max()) < vocab_size and int(window.min()) >= 0:
            return
        position = int(np.flatnonzero((window.astype(np.int64) >= vocab_size) | (window < 0))[0])
        raise DataError(
            f"{self._bin}: token {start + position} has id {int(window[position])}; allowed are ids from 0 to "
            f"{vocab_size - 1}, the tokenizer's vocabulary. Was this data prepared with another tokenizer?"
        )

    def _content_digest(self, idx_head: bytes) -> str:
        """SHA-256 over the head of the .idx and 16 evenly spread blocks of the .bin, with its length."""
        digest = hashlib.sha256(idx_head + self._bytes.to_bytes(8, "little"))
        with open_binary(self._bin) as file:
            for start, stop in spans(self._bytes, block=16_384, limit=16 * 16_384):
                digest.update(read_exactly(file.fileno(), stop - start, start))
        return digest.hexdigest()


class TokenStream:
    """Several pairs read as one stream of tokens, in the order given. Can be pickled and forked.

    Attributes:
        tokens: count over all pairs.
    """

    def __init__(self, prefixes: Sequence[Path], vocab_size: int | None = None) -> None:
        """Open and check every pair; see IndexedTokens.

        Raises:
            DataError: no prefix is given, or a pair is at fault.
        """
        if not prefixes:
            raise DataError("a token stream needs at least one .bin/.idx pair, got none")
        scan_tokens = FULL_SCAN_TOKENS // len(prefixes)
        self._pairs = [IndexedTokens(prefix, vocab_size=vocab_size, scan_tokens=scan_tokens) for prefix in prefixes]
        self._starts = [0, *accumulate(pair.tokens for pair in self._pairs)]
        self._recent: OrderedDict[int, None] = OrderedDict()
        self.tokens = self._starts[-1]

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return tokens [start, start + count) of the stream as int64, over as many files as they lie in.

        Raises:
            DataError: a file changed since it was opened, or an id of the window is not in the vocabulary.
        """
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of a stream of {self.tokens}")
        parts = []
        stop = start + count
        while start < stop:
            number = bisect_right(self._starts, start) - 1
            upto = min(stop, self._starts[number + 1])
            parts.append(self._pairs[number].read(start - self._starts[number], upto - start))
            self._keep_open(number)
            start = upto
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.int64)])

    def fingerprint(self) -> str:
        """Hexadecimal identity of the content: the same on every machine and path, another for other tokens."""
        return hashlib.sha256("\n".join(pair.digest for pair in self._pairs).encode()).hexdigest()

    def _keep_open(self, number: int) -> None:
        """Note that a file was just read, and close the one that was not for longest if too many are open."""
        self._recent[number] = None
        self._recent.move_to_end(number)
        if len(self._recent) > OPEN_FILES:
            self._pairs[self._recent.popitem(last=False)[0]].close()


def count_tokens(prefix: Path) -> int:
    """Tokens of a pair from its header, its last entry and its lengths alone: no matter how large, a few reads.

    Raises:
        DataError: a file is missing or damaged.
    """
    bin_path, idx = pair_paths(prefix)
    header = read_header(idx)
    bin_bytes, _ = size_and_mtime(bin_path)
    tokens = checked_tokens(bin_path, bin_bytes, header)
    if header.sequences:
        with open_binary(idx) as file:
            check_pointers(file.fileno(), idx, header, bin_bytes, (header.sequences - 1, header.sequences))
    return tokens


def find_prefixes(spec: str | Sequence[str]) -> list[Path]:
    """Return the pairs that a prefix, a glob over prefixes, or a list of these names, in order; globs are sorted.

    Raises:
        DataError: an entry names nothing, a pair is named twice, half of a pair is missing, or a glob takes in a pair
            together with the PREFIX-validation that `prepare` holds out of it.
    """
    found: list[Path] = []
    for entry in _entries(spec):
        matched = _match(entry)
        if not matched:
            raise DataError(
                f"{entry}: no .bin/.idx pair of that name. Allowed are a prefix (the path without .bin and .idx), a "
                "glob over prefixes, or a list of these; `titan-cpt prepare` makes a pair from text"
            )
        for prefix in matched:
            if not pair_paths(prefix)[0].exists():
                raise DataError(f"{prefix}.bin: is missing, and {prefix}.idx is there: copy both or remove both")
            if prefix in found:
                raise DataError(f"{entry}: names {prefix} a second time: its tokens would be read twice; name it once")
            if Path(f"{prefix}-validation") in matched:
                raise DataError(
                    f"{entry}: matches {prefix} and the held-out {prefix}-validation: training would see what "
                    "validation measures; narrow the glob, or list the prefixes"
                )
            found.append(prefix)
    if not found:
        raise DataError("an empty list names no .bin/.idx pair; give at least one prefix")
    return found


def missing(spec: str | Sequence[str]) -> list[str]:
    """Return those entries of a spec (see find_prefixes) for which a file is not there yet; [] if all are."""
    absent = []
    for entry in _entries(spec):
        matched = _match(entry)
        if not matched or not all(pair_paths(prefix)[0].exists() for prefix in matched):
            absent.append(entry)
    return absent


def _entries(spec: str | Sequence[str]) -> list[str]:
    return [spec] if isinstance(spec, str) else list(spec)


def _match(entry: str) -> list[Path]:
    """The prefixes that an entry names and whose .idx is there; a literal name goes before a glob."""
    prefix = entry.removesuffix(".idx").removesuffix(".bin")
    if Path(f"{prefix}.idx").exists():
        return [Path(prefix)]
    if not glob.has_magic(prefix):
        return []
    return [Path(idx.removesuffix(".idx")) for idx in sorted(glob.glob(f"{prefix}.idx", recursive=True))]
