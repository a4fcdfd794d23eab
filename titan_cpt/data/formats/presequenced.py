"""Sequences that were cut and shuffled before: Pythia's, of 2049 tokens, in the order in which it was trained on them.

Window k is tokens [k (L + 1), (k + 1)(L + 1)): no token is in two windows, and the order of first sight is the files'
own. They come as a .bin/.idx pair whose every entry is one sequence, or as the bare .bin: its shards, as the hub hands
them out, are cut at any byte that begins a token, so that windows may run over from one into the next.

Source: Pythia's utils/mmap_dataset.py and unshard_memmap.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titan_cpt.data.formats.array_file import TokenFile
from titan_cpt.data.formats.indexed import IndexedTokens, TokenStream
from titan_cpt.data.formats.indexed_layout import (
    FULL_CHECK_SEQUENCES,
    Header,
    open_binary,
    pair_paths,
    read_exactly,
    read_header,
    spans,
)
from titan_cpt.errors import DataError


class Presequenced(TokenStream):
    """Files whose tokens are sequences of seq_len + 1 one behind another."""

    def __init__(
        self,
        paths: Sequence[Path],
        vocab_size: int | None = None,
        *,
        open_file: Callable[..., TokenFile] = IndexedTokens,
        in_stored_order: bool = True,
    ) -> None:
        """Open and check every file; see TokenStream.

        Raises:
            DataError: a file is at fault, or an entry of an .idx is longer or shorter than the others.
        """
        super().__init__(paths, vocab_size, open_file=open_file, in_stored_order=in_stored_order)
        self._where = _named(paths)
        self._lengths = {_even_length(path) for path in paths} if open_file is IndexedTokens else set()

    def windows(self, seq_len: int) -> int:
        """How many sequences there are.

        Raises:
            DataError: they are of another length, or the tokens are no whole number of them.
        """
        return _counted(self._where, self._lengths, self.tokens, seq_len)

    def window(self, number: int, seq_len: int) -> npt.NDArray[np.int64]:
        """The seq_len + 1 tokens of a sequence; see TokenStream.read."""
        return self.read(number * (seq_len + 1), seq_len + 1)

    def fingerprint(self) -> str:
        """Another one than that of the same files read as a stream."""
        return f"presequenced {super().fingerprint()}"


def count_presequenced(paths: Sequence[Path], tokens: int, seq_len: int, *, paired: bool) -> int:
    """How many sequences files of so many tokens hold; of pairs, the first entry of each .idx is looked at.

    Raises:
        DataError: they are of another length, or the tokens are no whole number of them.
    """
    return _counted(_named(paths), {_first_length(path) for path in paths} if paired else set(), tokens, seq_len)


def _named(paths: Sequence[Path]) -> str:
    return f"{paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)}"


def _counted(where: str, lengths: set[int], tokens: int, seq_len: int) -> int:
    """Sequences of seq_len + 1 in so many tokens; `lengths` are those that an .idx tells, none without one."""
    if other := lengths - {0, seq_len + 1}:
        raise DataError(
            f"{where}: sequences of {min(other)} tokens; allowed is training.seq_len + 1 = {seq_len + 1} for every "
            f'one: set training.seq_len = {min(other) - 1}, or, if they are documents, format = "indexed"'
        )
    if tokens % (seq_len + 1):
        raise DataError(
            f"{where}: {tokens} tokens are no whole number of sequences of training.seq_len + 1 = {seq_len + 1} "
            "(Pythia's are of 2049): set training.seq_len to what they were cut to, or a file is missing or cut short"
        )
    return tokens // (seq_len + 1)


def _first_length(prefix: Path) -> int:
    """Tokens of the first entry of a pair's .idx, 0 if it has none."""
    idx = pair_paths(prefix)[1]
    header = read_header(idx)
    return int(_lengths(idx, header, 0, 1)[0]) if header.sequences else 0


def _even_length(prefix: Path) -> int:
    """The same, every other entry compared with it."""
    idx = pair_paths(prefix)[1]
    header, length = read_header(idx), _first_length(prefix)
    for start, stop in spans(header.sequences, block=65_536, limit=FULL_CHECK_SEQUENCES):
        lengths = _lengths(idx, header, start, stop)
        wrong = np.flatnonzero(lengths != length)
        if len(wrong):
            first = int(wrong[0])
            raise DataError(
                f"{idx}: sequence {start + first} has {lengths[first]} tokens, and the first one {length}; allowed are "
                'sequences of one length. Documents of any length are format = "indexed"'
            )
    return length


def _lengths(idx: Path, header: Header, start: int, stop: int) -> npt.NDArray[np.int32]:
    with open_binary(idx) as file:
        return np.frombuffer(read_exactly(file.fileno(), 4 * (stop - start), header.sizes_at(start)), "<i4")
