"""Read Megatron's .bin/.idx pairs (IndexedDataset): the tokens of all documents concatenated into one stream.

Training reads only the token stream, never the document borders, so the index is checked on open and not kept in
memory. indexed_layout.py describes the format, array_file.py reads it, indexed_writer.py writes it.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from titan_cpt.data.file_names import UniqueFiles, as_entries, expand_glob, glob_escape_hint, name_exists
from titan_cpt.data.formats.array_file import TokenFile
from titan_cpt.data.formats.indexed_layout import (
    OpenFile,
    check_index,
    check_pointers,
    checked_tokens,
    pair_locations,
    read_header,
    size_and_mtime,
)
from titan_cpt.errors import DataError
from titan_cpt.object_storage.locations import CacheSettings, Location, RemotePath, located

FULL_SCAN_TOKENS = 64_000_000  # a stream of up to this many tokens is compared with the vocabulary on open
OPEN_FILES = 64  # .bin files that one stream keeps open; the usual limit per process is 1024


class IndexedTokens(TokenFile):
    """One .bin/.idx pair, checked on open; any range of its tokens can be read.

    Attributes:
        prefix: the path without .bin and .idx.
        sequences: number of sequences in the .idx.
        digest: SHA-256 over the head of the .idx, the length of the .bin and evenly spaced blocks of the .bin.
    """

    def __init__(self, prefix: Location, *, vocab_size: int | None = None, scan_tokens: int = FULL_SCAN_TOKENS) -> None:
        """Open and check the pair.

        Args:
            prefix: the path without .bin and .idx.
            vocab_size: see TokenFile.
            scan_tokens: see TokenFile.

        Raises:
            DataError: a file is missing or damaged, the .bin and the .idx do not match, or an id is outside the
                vocabulary.
        """
        self.prefix = prefix
        bin_path, idx = pair_locations(prefix)
        header = read_header(idx)
        self.sequences = header.sequences
        bin_bytes, _ = size_and_mtime(bin_path)
        checked_tokens(bin_path, bin_bytes, header)
        with OpenFile(idx) as file:
            check_index(file, idx, header, bin_bytes)
        super().__init__(bin_path, header.dtype, vocab_size=vocab_size, scan_tokens=scan_tokens, described_by=idx)


class TokenStream:
    """Several files concatenated into one stream of tokens, in the order given. Can be pickled and forked.

    Window k is tokens [k seq_len, (k + 1) seq_len]: its last token, the last target, is the first token of window
    k + 1. Megatron's GPTDataset cuts its samples in the same way.

    Attributes:
        tokens: number of tokens of all files.
        in_stored_order: each epoch reads the windows in stored order, not permuted.
        is_remote: a file is in object storage.
    """

    def __init__(
        self,
        paths: Sequence[Location],
        vocab_size: int | None = None,
        *,
        open_file: Callable[..., TokenFile] = IndexedTokens,
        in_stored_order: bool = False,
    ) -> None:
        """Open and check every file.

        Args:
            paths: prefixes of .bin/.idx pairs, or the paths that `open_file` opens.
            vocab_size: see TokenFile.
            open_file: called with a path, vocab_size and scan_tokens.
            in_stored_order: see Attributes.

        Raises:
            DataError: `paths` is empty, or a file is damaged.
        """
        if not paths:
            raise DataError("a token stream needs at least one token file, got none")
        scan_tokens = FULL_SCAN_TOKENS // len(paths)
        self._files = [open_file(path, vocab_size=vocab_size, scan_tokens=scan_tokens) for path in paths]
        self._starts = [0, *accumulate(file.tokens for file in self._files)]
        self.is_remote = any(isinstance(path, RemotePath) for path in paths)
        self._recent: OrderedDict[int, None] = OrderedDict()
        self.tokens = self._starts[-1]
        self.in_stored_order = in_stored_order

    def windows(self, seq_len: int) -> int:
        """Return the number of windows of seq_len + 1 tokens; the remainder at the end of the stream is not used."""
        return max(0, self.tokens - 1) // seq_len

    def window(self, number: int, seq_len: int) -> npt.NDArray[np.int64]:
        """Return the seq_len + 1 tokens of a window, int64; see `read`."""
        return self.read(number * seq_len, seq_len + 1)

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return tokens [start, start + count) of the stream as int64, across file borders.

        Raises:
            DataError: a file changed since it was opened, or one of these ids is outside the vocabulary.
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

    def fetch(self, numbers: Sequence[int], seq_len: int) -> None:
        """Fetch windows of remote files that will be read soon into the cache, concurrently."""
        firsts = (number * self._stride(seq_len) for number in numbers)
        self.fetch_ranges((first, first + seq_len + 1) for first in firsts)

    def fetch_ranges(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch tokens [start, stop) of remote files that will be read soon into the cache, concurrently."""
        if not self.is_remote:
            return
        by_file: dict[int, list[tuple[int, int]]] = {}
        for start, stop in ranges:
            while start < stop:
                file = bisect_right(self._starts, start) - 1
                upto = min(stop, self._starts[file + 1])
                by_file.setdefault(file, []).append((start - self._starts[file], upto - self._starts[file]))
                start = upto
        for file, within in by_file.items():
            self._files[file].fetch(within)

    def _stride(self, seq_len: int) -> int:
        """Tokens from the first one of a window to the first one of the next."""
        return seq_len

    def fingerprint(self) -> str:
        """Return a hexadecimal digest of the content; it does not depend on the machine or the paths."""
        return hashlib.sha256("\n".join(file.digest for file in self._files).encode()).hexdigest()

    def _keep_open(self, number: int) -> None:
        """Mark a file as used; if too many files are open, close the least recently used one."""
        self._recent[number] = None
        self._recent.move_to_end(number)
        if len(self._recent) > OPEN_FILES:
            self._files[self._recent.popitem(last=False)[0]].close()


def count_tokens(prefix: Location) -> int:
    """Count the tokens of a pair from its header, its last index entry and its file sizes: a few reads at any size.

    Raises:
        DataError: a file is missing or damaged.
    """
    bin_path, idx = pair_locations(prefix)
    header = read_header(idx)
    bin_bytes, _ = size_and_mtime(bin_path)
    tokens = checked_tokens(bin_path, bin_bytes, header)
    if header.sequences:
        with OpenFile(idx) as file:
            check_pointers(file, idx, header, bin_bytes, (header.sequences - 1, header.sequences))
    return tokens


def find_prefixes(spec: str | Sequence[str], cache: CacheSettings | None = None) -> list[Location]:
    """Return the pairs named by a prefix, a glob over prefixes, or a list of these, in order; globs are sorted.

    Args:
        spec: names; URLs for object storage.
        cache: the cache of remote files, required for URLs.

    Raises:
        DataError: an entry matches nothing, a pair is named twice, one file of a pair is missing, or a glob matches
            both a pair and the PREFIX-validation that `prepare` split off from it.
    """
    found: list[Location] = []
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
            if not name_exists(f"{name}.bin"):
                raise DataError(f"{name}.bin: is missing, but {name}.idx exists: copy both or remove both")
            once.add(entry, name, f"{name}.bin")
            if f"{name}-validation" in names:
                raise DataError(
                    f"{entry}: matches {name} and its validation data {name}-validation: the model would train on "
                    "the text that validation measures; narrow the glob, or list the prefixes"
                )
            found.append(located(name, cache))
    if not found:
        raise DataError("the list of .bin/.idx pairs is empty; give at least one prefix")
    return found


def missing_prefixes(spec: str | Sequence[str]) -> list[str]:
    """Return the entries of a spec (see find_prefixes) of which a file does not exist yet."""
    absent = []
    for entry in as_entries(spec):
        matched = _match(entry)
        if not matched or not all(name_exists(f"{name}.bin") for name in matched):
            absent.append(entry)
    return absent


def _match(entry: str) -> list[str]:
    """Return the prefixes that an entry matches and whose .idx exists; an existing literal name is not globbed."""
    prefix = entry.removesuffix(".idx").removesuffix(".bin")
    if name_exists(f"{prefix}.idx"):
        return [prefix]
    return [idx.removesuffix(".idx") for idx in expand_glob(f"{prefix}.idx")]
