"""Sequences that were cut and shuffled in advance, such as Pythia's sequences of 2049 tokens, in training order.

Window k is tokens [k (L + 1), (k + 1)(L + 1)): windows share no token, and the stored order is the training order. The
files are a .bin/.idx pair with one sequence per entry, or the .bin without an index. The .bin shards on the Hugging
Face hub are cut between any two tokens, so a window may continue in the next file.

Source: Pythia's utils/mmap_dataset.py and unshard_memmap.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from titan_cpt.data.formats.array_file import TokenFile
from titan_cpt.data.formats.indexed import IndexedTokens, TokenStream
from titan_cpt.data.formats.indexed_layout import (
    FULL_CHECK_SEQUENCES,
    REMOTE_CHECK_SEQUENCES,
    Header,
    OpenFile,
    pair_locations,
    read_header,
    spans,
)
from titan_cpt.errors import DataError
from titan_cpt.object_storage.locations import Location, RemotePath


class Presequenced(TokenStream):
    """Files that contain sequences of seq_len + 1 tokens, one after the other."""

    def __init__(
        self,
        paths: Sequence[Location],
        vocab_size: int | None = None,
        *,
        open_file: Callable[..., TokenFile] = IndexedTokens,
        in_stored_order: bool = True,
    ) -> None:
        """Open and check every file; see TokenStream.

        Raises:
            DataError: a file is damaged, or the entries of an .idx differ in length.
        """
        super().__init__(paths, vocab_size, open_file=open_file, in_stored_order=in_stored_order)
        self._where = _describe(paths)
        self._lengths = {_common_length(path) for path in paths} if open_file is IndexedTokens else set()

    def windows(self, seq_len: int) -> int:
        """Return the number of sequences.

        Raises:
            DataError: the sequences have another length, or the tokens are not a whole number of sequences.
        """
        return _count_sequences(self._where, self._lengths, self.tokens, seq_len)

    def window(self, number: int, seq_len: int) -> npt.NDArray[np.int64]:
        """Return the seq_len + 1 tokens of a sequence, int64; see TokenStream.read."""
        return self.read(number * (seq_len + 1), seq_len + 1)

    def _stride(self, seq_len: int) -> int:
        return seq_len + 1

    def fingerprint(self) -> str:
        """Return a digest that differs from that of the same files read as a token stream."""
        return f"presequenced {super().fingerprint()}"


def count_presequenced(paths: Sequence[Location], tokens: int, seq_len: int, *, paired: bool) -> int:
    """Return the number of sequences in files of `tokens` tokens, from the first entry of each .idx if there is one.

    Raises:
        DataError: the sequences have another length, or the tokens are not a whole number of sequences.
    """
    return _count_sequences(
        _describe(paths), {_first_length(path) for path in paths} if paired else set(), tokens, seq_len
    )


def _describe(paths: Sequence[Location]) -> str:
    return f"{paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)}"


def _count_sequences(where: str, lengths: set[int], tokens: int, seq_len: int) -> int:
    """Number of sequences of seq_len + 1 in `tokens` tokens. `lengths`: sequence lengths in the .idx files, if any."""
    if other := lengths - {0, seq_len + 1}:
        raise DataError(
            f"{where}: has sequences of {min(other)} tokens; allowed is training.seq_len + 1 = {seq_len + 1} for "
            f'each: set training.seq_len = {min(other) - 1}, or, if they are documents, format = "indexed"'
        )
    if tokens % (seq_len + 1):
        raise DataError(
            f"{where}: {tokens} tokens are not a multiple of training.seq_len + 1 = {seq_len + 1} (for Pythia, "
            "2049): set training.seq_len to the length of the sequences minus 1. If it is right, a file is missing "
            "or incomplete"
        )
    return tokens // (seq_len + 1)


def _first_length(prefix: Location) -> int:
    """Number of tokens of the first entry of a pair's .idx; 0 if it has no entries."""
    idx = pair_locations(prefix)[1]
    header = read_header(idx)
    with OpenFile(idx) as file:
        return int(_lengths(file, header, 0, 1)[0]) if header.sequences else 0


def _common_length(prefix: Location) -> int:
    """Number of tokens of every entry of a pair's .idx; raises DataError if they differ."""
    idx = pair_locations(prefix)[1]
    header = read_header(idx)
    length = _first_length(prefix)
    limit = REMOTE_CHECK_SEQUENCES if isinstance(idx, RemotePath) else FULL_CHECK_SEQUENCES
    with OpenFile(idx) as file:
        for start, stop in spans(header.sequences, block=65_536, limit=limit):
            lengths = _lengths(file, header, start, stop)
            wrong = np.flatnonzero(lengths != length)
            if len(wrong):
                first = int(wrong[0])
                raise DataError(
                    f"{idx}: sequence {start + first} has {lengths[first]} tokens, the first one {length}; all must "
                    'have the same length. For documents of any length, set format = "indexed"'
                )
    return length


def _lengths(file: OpenFile, header: Header, start: int, stop: int) -> npt.NDArray[np.int32]:
    return np.frombuffer(file.read(4 * (stop - start), header.sizes_at(start)), "<i4")
