"""From document lengths to packed sequences: what is cut, groups, counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed import documents, pack_plainly

from titan_cpt.data.packing import pieces
from titan_cpt.data.packing.pieces import PackingCounts, count_packing, decode, encode, packed_segments
from titan_cpt.errors import DataError


def packed(lengths, seq_len, **how):
    """[(start, length, continues), ...] of every sequence, its targets, and the counts."""
    sequences, targets, counts = [], [], PackingCounts()
    for segment, counted in packed_segments([np.array(lengths, np.int64)], seq_len, **how):
        found = decode(segment.pieces, seq_len)
        for begin, end in zip(segment.starts[:-1].tolist(), segment.starts[1:].tolist(), strict=True):
            sequences.append([tuple(piece) for piece in found[begin:end]])
        targets += segment.targets.tolist()
        counts += counted
    return sequences, targets, counts


@given(documents(), st.integers(1, 70))
def test_sequences_are_those_of_plain_packing_and_have_every_token_once(drawn, group):
    lengths, seq_len = drawn
    sequences, targets, counts = packed(lengths, seq_len, group_documents=group)

    assert sequences == pack_plainly(lengths, seq_len, group)
    assert sorted(s + k for seq in sequences for s, length, _ in seq for k in range(length)) == [*range(sum(lengths))]
    assert all(0 < sum(length for _, length, _ in sequence) <= seq_len for sequence in sequences)
    assert targets == [sum(length - (not continues) for _, length, continues in each) for each in sequences]
    assert counts == count_packing([np.array(lengths, np.int64)], seq_len, group_documents=group)
    assert (counts.documents, counts.tokens, counts.sequences) == (len(lengths), sum(lengths), len(sequences))
    assert counts.targets == sum(targets)
    assert counts.cut_documents == sum(length > seq_len for length in lengths)


@given(documents())
def test_a_document_is_whole_or_cut_at_multiples_of_the_sequence_length(drawn):
    lengths, seq_len = drawn
    sequences, _, _ = packed(lengths, seq_len)
    found = {start: (length, continues) for sequence in sequences for start, length, continues in sequence}
    position = 0
    for length in lengths:
        while length > seq_len:
            assert found.pop(position) == (seq_len, True)
            position, length = position + seq_len, length - seq_len
        if length:
            assert found.pop(position) == (length, False)
        position += length
    assert not found


def test_long_documents_are_written_in_segments_of_bounded_size(monkeypatch):
    lengths = [30, 5, 47, 9]
    together = packed(lengths, 4)
    monkeypatch.setattr(pieces, "SEGMENT_PIECES", 3)

    assert packed(lengths, 4) == together
    assert [len(s.pieces) for s, _ in packed_segments([np.array(lengths)], 4)] == [3, 3, 3, 3, 3, 3, 3, 4]


def test_blocks_of_lengths_may_have_any_size():
    lengths = np.arange(50, dtype=np.int64) % 13
    blocks = [lengths[:0], lengths[:7], lengths[7:8], lengths[8:]]
    one = [segment.pieces.tolist() for segment, _ in packed_segments([lengths], 10, group_documents=6)]

    assert [segment.pieces.tolist() for segment, _ in packed_segments(blocks, 10, group_documents=6)] == one


def test_fill_is_the_fraction_of_positions_with_a_token():
    counts = count_packing([np.array([7, 2, 6])], 10)

    assert (counts.sequences, counts.fill(10)) == (2, 0.75)
    assert PackingCounts().fill(10) == 0.0


def test_a_piece_is_stored_in_64_bits_at_positions_beyond_10_to_the_14():
    starts = np.array([10**14, 0])
    stored = encode(starts, np.array([2048, 1]), np.array([True, False]), 2048)

    assert [tuple(piece) for piece in decode(stored, 2048)] == [(10**14, 2048, True), (0, 1, False)]
    with pytest.raises(DataError, match="divide the data into domains"):
        encode(np.array([2**52]), 1, False, 2048)
