"""Trained text of several sequence lengths and its replay: laws, against the text written out token by token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.data.trained_text import Leg, ReplayedText, TrainedPart, trained_tokens, with_leg

LEGS = st.lists(
    st.builds(Leg, seq_len=st.integers(1, 9), first=st.integers(0, 5), count=st.integers(1, 6)), min_size=1, max_size=4
)


def written_out(legs):
    """(sequence length, ordinal, position) of every token of the trained text."""
    return [
        (leg.seq_len, ordinal, position)
        for leg in legs
        for ordinal in range(leg.first, leg.first + leg.count)
        for position in range(leg.seq_len)
    ]


def tokens_of(parts):
    return [(part.seq_len, part.ordinal, position) for part in parts for position in range(part.start, part.stop)]


@given(LEGS, st.integers(1, 20), st.integers(0, 300), st.integers(1, 40))
def test_rows_are_the_trained_text_in_order_from_any_token_on(legs, seq_len, first, rows):
    """Nothing is omitted or added: each token is replayed once before any is replayed twice."""
    text = written_out(legs)
    replay = ReplayedText(tuple(legs), seq_len, first)
    replayed = [token for row in range(rows) for token in tokens_of(replay.row(row))]

    assert replay.tokens == trained_tokens(legs) == len(text)
    assert replayed == [text[(first + place) % len(text)] for place in range(rows * seq_len)]
    assert replay.tokens_after(rows) == first + rows * seq_len


@given(LEGS, st.integers(1, 12), st.integers(0, 100))
def test_a_round_of_reshuffled_rows_has_every_whole_piece_of_the_text_once(legs, seq_len, first):
    """The rows of the first whole round, compared with the text cut into pieces; another round has another order."""
    text = written_out(legs)
    pieces = [text[begin : begin + seq_len] for begin in range(0, len(text) - seq_len + 1, seq_len)]
    replay = ReplayedText(tuple(legs), seq_len, first, "key")
    begun = replay.tokens_after(0) // seq_len
    if not pieces:
        assert len(tokens_of(replay.row(0))) == seq_len
        return
    rest = -begun % len(pieces)
    rows = [tokens_of(replay.row(row)) for row in range(rest, rest + len(pieces))]

    assert begun * seq_len - first in range(seq_len)
    assert sorted(rows) == sorted(pieces)


@given(st.integers(1, 9), st.integers(0, 5), st.integers(1, 12), st.integers(0, 20))
def test_with_one_length_the_rows_are_the_trained_sequences(seq_len, first, count, row):
    """One whole part each."""
    replay = ReplayedText((Leg(seq_len, first, count),), seq_len, 2 * seq_len)

    assert replay.row(row) == (TrainedPart(seq_len, first + (2 + row) % count, 0, seq_len),)


def test_a_leg_that_continues_the_last_one_is_merged_with_it():
    """The order of a length continues at the ordinal where it ended, unless another length came in between."""
    legs = with_leg((), Leg(16, 0, 10))

    assert with_leg(legs, Leg(16, 10, 5)) == (Leg(16, 0, 15),)
    assert with_leg(legs, Leg(64, 3, 5)) == (Leg(16, 0, 10), Leg(64, 3, 5))
    assert with_leg(with_leg(legs, Leg(64, 3, 1)), Leg(16, 14, 2)) == (Leg(16, 0, 10), Leg(64, 3, 1), Leg(16, 14, 2))
    assert with_leg(legs, Leg(16, 10, 0)) == legs
