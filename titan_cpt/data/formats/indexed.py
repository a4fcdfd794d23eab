"""Megatron's .bin/.idx pairs, read: the tokens of many documents one behind another, as one stream.

A training run needs the token stream alone, never the sequence borders: the index is checked on open and not kept. The
format is in indexed_layout.py, reading in array_file.py, writing in indexed_writer.py.
"""

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titan_cpt.data.file_names import UniqueFiles, as_entries, expand_glob, glob_escape_hint
from titan_cpt.data.formats.array_file import TokenFile
from titan_cpt.data.formats.indexed_layout import (
    check_index,
    check_pointers,
    checked_tokens,
    open_binary,
    pair_paths,
    read_header,
    size_and_mtime,
)
from titan_cpt.errors import DataError

FULL_SCAN_TOKENS = 64_000_000  # up to this every token is compared with the vocabulary on open
OPEN_FILES = 64  # .bin files that one stream keeps open; the usual limit of a process is 1024


class IndexedTokens(TokenFile):
    """One .bin/.idx pair, checked on open, of which any window of tokens can be read.

    Attributes:
        prefix: the path without .bin and .idx.
        sequences: count, of the .idx.
        digest: SHA-256 over the head of the .idx, the length of the .bin and evenly spread blocks of it.
    """

    def __init__(self, prefix: Path, *, vocab_size: int | None = None, scan_tokens: int = FULL_SCAN_TOKENS) -> None:
        """Open and check the pair.

        Args:
            prefix: the path without .bin and .idx.
            vocab_size: see TokenFile.
            scan_tokens: see TokenFile.

        Raises:
            DataError: a file is missing or damaged, the halves do not belong together, or an id is not in the
                vocabulary.
        """
        self.prefix = prefix
        bin_path, idx = pair_paths(prefix)
        header = read_header(idx)
        self.sequences = header.sequences
        bin_bytes, _ = size_and_mtime(bin_path)
        checked_tokens(bin_path, bin_bytes, header)
        with open_binary(idx) as file:
            check_index(file.fileno(), idx, header, bin_bytes)
        super().__init__(bin_path, header.dtype, vocab_size=vocab_size, scan_tokens=scan_tokens, described_by=idx)


class TokenStream:
    """Several files read as one stream of tokens, in the order given. Can be pickled and forked.

    Window k of it begins at token k x seq_len: the last token of one window is the first of the next.

    Attributes:
        tokens: count over all files.
        in_stored_order: windows are seen as they lie, rather than permuted.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        vocab_size: int | None = None,
        *,
        open_file: Callable[..., TokenFile] = IndexedTokens,
        in_stored_order: bool = False,
    ) -> None:
        """Open and check every file.

        Args:
            paths: prefixes of .bin/.idx pairs, or whatever `open_file` opens.
            vocab_size: see TokenFile.
            open_file: called with a path, vocab_size and scan_tokens.
            in_stored_order: windows are seen as they lie.

        Raises:
            DataError: no path is given, or a file is at fault.
        """
        if not paths:
            raise DataError("a token stream needs at least one file of tokens, got none")
        scan_tokens = FULL_SCAN_TOKENS // len(paths)
        self._files = [open_file(path, vocab_size=vocab_size, scan_tokens=scan_tokens) for path in paths]
        self._starts = [0, *accumulate(file.tokens for file in self._files)]
        self._recent: OrderedDict[int, None] = OrderedDict()
        self.tokens, self.in_stored_order = self._starts[-1], in_stored_order

    def windows(self, seq_len: int) -> int:
        """How many windows of seq_len + 1 tokens there are; what is left at the end belongs to none."""
        return max(0, self.tokens - 1) // seq_len

    def window(self, number: int, seq_len: int) -> npt.NDArray[np.int64]:
        """The seq_len + 1 tokens of a window; see read."""
        return self.read(number * seq_len, seq_len + 1)

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
            parts.append(self._files[number].read(start - self._starts[number], upto - start))
            self._keep_open(number)
            start = upto
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.int64)])

    def fingerprint(self) -> str:
        """Hexadecimal identity of the content: the same on every machine and path, another for other tokens."""
        return hashlib.sha256("\n".join(file.digest for file in self._files).encode()).hexdigest()

    def _keep_open(self, number: int) -> None:
        """Note that a file was just read, and close the one that was not for longest if too many are open."""
        self._recent[number] = None
        self._recent.move_to_end(number)
        if len(self._recent) > OPEN_FILES:
            self._files[self._recent.popitem(last=False)[0]].close()


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
    once = UniqueFiles("tokens")
    for entry in as_entries(spec):
        matched = _match(entry)
        if not matched:
            raise DataError(
                f"{entry}: no .bin/.idx pair of that name. Allowed are a prefix (the path without .bin and .idx), a "
                "glob over prefixes, or a list of these; `titan-cpt prepare` makes a pair from text"
                + glob_escape_hint(entry)
            )
        names = set(matched)
        for name in matched:
            if not os.path.exists(f"{name}.bin"):
                raise DataError(f"{name}.bin: is missing, and {name}.idx is there: copy both or remove both")
            once.add(entry, name, f"{name}.bin")
            if f"{name}-validation" in names:
                raise DataError(
                    f"{entry}: matches {name} and the held-out {name}-validation: training would see what "
                    "validation measures; narrow the glob, or list the prefixes"
                )
            found.append(Path(name))
    if not found:
        raise DataError("an empty list names no .bin/.idx pair; give at least one prefix")
    return found


def missing_prefixes(spec: str | Sequence[str]) -> list[str]:
    """Return those entries of a spec (see find_prefixes) for which a file is not there yet; [] if all are."""
    absent = []
    for entry in as_entries(spec):
        matched = _match(entry)
        if not matched or not all(os.path.exists(f"{name}.bin") for name in matched):
            absent.append(entry)
    return absent


def _match(entry: str) -> list[str]:
    """The prefixes that an entry names and whose .idx is there; a literal name goes before a glob."""
    prefix = entry.removesuffix(".idx").removesuffix(".bin")
    if os.path.exists(f"{prefix}.idx"):
        return [prefix]
    return [idx.removesuffix(".idx") for idx in expand_glob(f"{prefix}.idx")]
