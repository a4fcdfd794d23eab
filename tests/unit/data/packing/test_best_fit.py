"""Packing in bulk gives each piece the sequence that packing one piece after another gives it."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from packed import pack_plainly

from titan_cpt.data.packing.best_fit import assign, best_fit_moves, count_best_fit, stable_order


def in_sequences(lengths, seq_len):
    """The starts of the pieces of each sequence, as `assign` gives them."""
    sequence_of, sequences = assign(np.array(lengths, np.int64), seq_len)
    starts = np.cumsum(lengths) - lengths if lengths else []
    return [[int(start) for start, one in zip(starts, sequence_of, strict=True) if one == k] for k in range(sequences)]


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=80))))
@example((20, [15, 6, 6, 6, 3, 2]))  # the 2 goes to the first sequence, although the second had room 2 earlier
def test_every_piece_is_in_the_sequence_of_one_by_one_best_fit_decreasing(drawn):
    seq_len, lengths = drawn
    expected = [[start for start, _, _ in sequence] for sequence in pack_plainly(lengths, seq_len)]

    assert in_sequences(lengths, seq_len) == expected
    assert count_best_fit(np.bincount(lengths, minlength=seq_len + 1), seq_len) == len(expected)


def test_a_piece_goes_where_the_least_room_is_left():
    """By hand, room 10: 6 | 6; 4 fills the first; 3 into the second (room 4), 3 opens a third, 2 + 2 + 1 into it."""
    lengths = [1, 2, 6, 3, 6, 4, 2, 3]
    sequence_of, sequences = assign(np.array(lengths), 10)

    # In order of length: 6 -> 0, 6 -> 1, 4 -> 0, 3 -> 1 (room 1), 3 -> 2, 2 -> 2, 2 -> 2, 1 -> 1.
    assert sequences == 3
    assert sequence_of.tolist() == [1, 2, 0, 1, 1, 0, 2, 2]


def test_many_documents_of_few_lengths_take_few_moves():
    """The work depends on the number of lengths, not of documents: 10**15 of them are counted at once."""
    counts = np.zeros(2049, np.int64)
    counts[[700, 1000, 1348]] = 10**15
    moves = list(best_fit_moves(counts, 2048))

    # 1348 + 700 fill a sequence, and 1000 + 1000 leave 48.
    assert count_best_fit(counts, 2048) == 10**15 + 10**15 // 2
    assert len(moves) < 10


@given(st.lists(st.integers(0, 2**40)), st.just(2**40))
def test_the_order_of_wide_keys_is_stable(keys, highest):
    order = stable_order(np.array(keys, np.int64), highest)

    assert order.tolist() == sorted(range(len(keys)), key=keys.__getitem__)
