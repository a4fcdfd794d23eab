"""From the lengths of documents to packed sequences: cutting long documents, groups of documents, counts.

A document longer than a sequence is cut into pieces of seq_len tokens, which fill a sequence each; whole documents and
the last pieces of cut ones are packed by best_fit.py. Documents are packed in groups of 2**24 consecutive ones, so that
memory is bounded however many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titan_cpt.data.packing.best_fit import assign, count_best_fit, stable_order
from titan_cpt.errors import DataError

GROUP_DOCUMENTS = 1 << 24
"""Consecutive documents that are packed together. Changing it changes the order of the data: see index_file.VERSION."""
LONGEST_SEQUENCE = 1 << 24  # tokens: packing takes memory for each length that a piece can have
SEGMENT_PIECES = 1 << 24  # pieces of cut documents in a segment of the index


@dataclass(frozen=True)
class PackingCounts:
    """How the documents of a source fill sequences.

    Attributes:
        documents: number of documents, empty ones included.
        cut_documents: documents that are longer than a sequence.
        tokens: tokens of all documents.
        sequences: number of packed sequences.
        targets: positions that have a target: all except the last one of a document, and padding.
    """

    documents: int = 0
    cut_documents: int = 0
    tokens: int = 0
    sequences: int = 0
    targets: int = 0

    def __add__(self, other: PackingCounts) -> PackingCounts:
        """The counts of both."""
        return PackingCounts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def fill(self, seq_len: int) -> float:
        """Fraction of the positions of all sequences that are tokens and not padding."""
        return self.tokens / (self.sequences * seq_len) if self.sequences else 0.0


class Segment(NamedTuple):
    """Packed sequences, as the index stores them.

    Attributes:
        pieces: the pieces of all sequences, one after another, uint64 [P]; see `encode`.
        starts: number of the first piece of each sequence, and P, uint32 [S + 1].
        targets: positions of each sequence that have a target, uint32 [S].
    """

    pieces: NDArray[np.uint64]
    starts: NDArray[np.uint32]
    targets: NDArray[np.uint32]


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        start: its first token in the token stream.
        length: its tokens.
        continues: the document continues behind it, so its last position has a target.
    """

    start: int
    length: int
    continues: bool


def encode(
    starts: NDArray[np.int64], lengths: NDArray[np.int64] | int, continues: NDArray[np.bool_] | bool, seq_len: int
) -> NDArray[np.uint64]:
    """Return pieces as integers: start, length and `continues`, from the highest to the lowest bit.

    Raises:
        DataError: the token stream is too long for that.
    """
    bits = seq_len.bit_length() + 1
    if len(starts) and int(starts.max()) >> (64 - bits):
        raise DataError(
            f"{int(starts.max())} tokens before a document are too many to pack into sequences of {seq_len}: "
            f"{2 ** (64 - bits)} at most; divide the data into domains"
        )
    encoded: NDArray[np.uint64] = starts.astype(np.uint64) << np.uint64(bits)
    encoded |= np.asarray(lengths).astype(np.uint64) << np.uint64(1)
    encoded |= np.asarray(continues).astype(np.uint64)
    return encoded


def decode(pieces: NDArray[np.uint64], seq_len: int) -> list[Piece]:
    """Return the pieces that `encode` stored."""
    bits = seq_len.bit_length() + 1
    mask = (1 << bits) - 1
    return [Piece(each >> bits, (each & mask) >> 1, bool(each & 1)) for each in pieces.tolist()]


def count_packing(
    lengths: Iterable[NDArray[np.int64]], seq_len: int, *, group_documents: int = GROUP_DOCUMENTS
) -> PackingCounts:
    """Count sequences and targets without packing: a histogram of the lengths is enough.

    Args:
        lengths: the lengths of all documents in order, in blocks of any size.
        seq_len: tokens of a sequence.
        group_documents: documents that are packed together.
    """
    return sum((_counts(group, seq_len) for group in groups(lengths, group_documents)), PackingCounts())


def _counts(lengths: NDArray[np.int64], seq_len: int) -> PackingCounts:
    full = lengths // seq_len
    tails = np.bincount(lengths - full * seq_len, minlength=seq_len + 1)
    tails[0] = 0
    tokens = int(lengths.sum())
    documents = int(np.count_nonzero(lengths))
    cut = int(np.count_nonzero(lengths > seq_len))
    return PackingCounts(
        documents=len(lengths),
        cut_documents=cut,
        tokens=tokens,
        sequences=int(full.sum()) + count_best_fit(tails, seq_len),
        targets=tokens - documents,
    )


def groups(lengths: Iterable[NDArray[np.int64]], group_documents: int) -> Iterator[NDArray[np.int64]]:
    """Yield the lengths of `group_documents` documents at a time, fewer at the end, int64; each group is reused."""
    group = np.empty(group_documents, np.int64)
    filled = 0
    for block in lengths:
        while len(block):
            part = block[: group_documents - filled]
            group[filled : filled + len(part)] = part
            filled += len(part)
            block = block[len(part) :]
            if filled == group_documents:
                yield group
                filled = 0
    if filled:
        yield group[:filled]


def packed_segments(
    lengths: Iterable[NDArray[np.int64]], seq_len: int, *, group_documents: int = GROUP_DOCUMENTS
) -> Iterator[tuple[Segment, PackingCounts]]:
    """Yield the packed sequences of all documents in segments; the counts of a group come with its last segment.

    In each group the pieces of cut documents that fill a sequence come first, then the other sequences in the order in
    which best-fit-decreasing opens them. The pieces of a sequence are in the order of the token stream.

    Args: see `count_packing`.
    """
    before = 0
    for group in groups(lengths, group_documents):
        starts = np.cumsum(group) - group + before
        before += int(group.sum())
        for segment in _full_pieces(group, starts, seq_len):
            yield segment, PackingCounts()
        yield _best_fit(group, starts, seq_len), _counts(group, seq_len)


def _full_pieces(lengths: NDArray[np.int64], starts: NDArray[np.int64], seq_len: int) -> Iterator[Segment]:
    """The pieces of seq_len tokens, a sequence each, in the order of the token stream."""
    (long,) = np.nonzero(lengths >= seq_len)
    lengths, starts = lengths[long], starts[long]
    upto = np.cumsum(lengths // seq_len)
    total = int(upto[-1]) if len(upto) else 0
    for first in range(0, total, SEGMENT_PIECES):
        number = np.arange(first, min(first + SEGMENT_PIECES, total))
        document = np.searchsorted(upto, number, side="right")
        begin = (number - upto[document] + lengths[document] // seq_len) * seq_len
        continues = begin + seq_len < lengths[document]
        yield Segment(
            encode(starts[document] + begin, seq_len, continues, seq_len),
            np.arange(len(number) + 1, dtype=np.uint32),
            (continues + np.uint32(seq_len - 1)).astype(np.uint32),
        )


def _best_fit(lengths: NDArray[np.int64], starts: NDArray[np.int64], seq_len: int) -> Segment:
    """The whole documents below seq_len tokens and the last pieces of cut ones."""
    tails = lengths % seq_len
    (partial,) = np.nonzero(tails)
    tails = tails[partial]
    begins = (starts + lengths)[partial] - tails
    sequence_of, sequences = assign(tails.astype(np.int32), seq_len)
    order = stable_order(sequence_of, sequences)
    tails = tails[order]
    first = np.zeros(sequences + 1, np.int64)
    np.cumsum(np.bincount(sequence_of, minlength=sequences), out=first[1:])
    tokens = np.add.reduceat(tails, first[:-1]) if sequences else tails
    return Segment(
        encode(begins[order], tails, False, seq_len),
        first.astype(np.uint32),
        (tokens - np.diff(first)).astype(np.uint32),
    )
