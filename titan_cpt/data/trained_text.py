"""The trained text of a source: the sequences that weights were trained on, one after another, and its replay.

Stages may have different sequence lengths. The sequences of one length, in the order of their first training, are a
leg; the legs follow one another. A row of replay in a stage with sequences of L tokens is L consecutive tokens of that
text, so every token is replayed once before any is replayed twice. If all sequences have L tokens, the rows are those
sequences.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from titan_cpt.data.permutation import permuted


@dataclass(frozen=True)
class Leg:
    """Consecutive ordinals of a source that were trained on as new data, with one sequence length.

    Attributes:
        seq_len: tokens of a sequence.
        first: the first ordinal.
        count: number of ordinals.
    """

    seq_len: int
    first: int
    count: int

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences."""
        return self.seq_len * self.count


class TrainedPart(NamedTuple):
    """Tokens [start, stop) of a trained sequence.

    Attributes:
        seq_len: tokens of the sequence.
        ordinal: its ordinal in the order of sequences of this length.
        start: first token.
        stop: token after the last one.
    """

    seq_len: int
    ordinal: int
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole sequence."""
        return self.stop - self.start == self.seq_len


def trained_tokens(legs: Sequence[Leg]) -> int:
    """Number of tokens of all legs."""
    return sum(leg.tokens for leg in legs)


def with_leg(legs: Sequence[Leg], leg: Leg) -> tuple[Leg, ...]:
    """The legs after training on one more, which may continue the last one."""
    if not leg.count:
        return tuple(legs)
    if legs and legs[-1].seq_len == leg.seq_len and legs[-1].first + legs[-1].count == leg.first:
        return (*legs[:-1], Leg(leg.seq_len, legs[-1].first, legs[-1].count + leg.count))
    return (*legs, leg)


@dataclass(frozen=True)
class ReplayedText:
    """The replay of trained text in a stage whose sequences have another length than some of the trained ones.

    Attributes:
        legs: the trained text; not empty.
        seq_len: L, tokens of a row.
        first_token: position in the text at which the stage's replay begins; positions start over after the last token.
        reshuffle_key: key of the permutation of the rows; empty to replay them in order.
    """

    legs: tuple[Leg, ...]
    seq_len: int
    first_token: int
    reshuffle_key: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens of the text."""
        return self._ends[-1]

    def tokens_after(self, rows: int) -> int:
        """The position in the text after this number of rows, counted over all repetitions."""
        return self._first(0) + rows * self.seq_len

    def row(self, number: int) -> tuple[TrainedPart, ...]:
        """The parts of trained sequences that make up a row of the stage, in order."""
        first = self._first(number)
        if self.reshuffle_key:
            rows = max(1, self.tokens // self.seq_len)  # fewer than L tokens at the end of the text are omitted
            round_number, position = divmod(first // self.seq_len, rows)
            key = f"{self.reshuffle_key}/{round_number}"
            first = int(permuted(np.array([position]), rows, key)[0]) * self.seq_len
        return self._parts(first)

    def _first(self, number: int) -> int:
        """The position of a row's first token; permuted rows begin at a multiple of L."""
        first = self.first_token
        if self.reshuffle_key:
            first = -(-first // self.seq_len) * self.seq_len
        return first + number * self.seq_len

    def _parts(self, first: int) -> tuple[TrainedPart, ...]:
        parts: list[TrainedPart] = []
        left = self.seq_len
        while left:
            position = first % self.tokens
            number = bisect_right(self._ends, position)
            leg = self.legs[number]
            sequence, start = divmod(position - (self._ends[number] - leg.tokens), leg.seq_len)
            stop = min(leg.seq_len, start + left)
            parts.append(TrainedPart(leg.seq_len, leg.first + sequence, start, stop))
            first += stop - start
            left -= stop - start
        return tuple(parts)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(accumulate(leg.tokens for leg in self.legs))
