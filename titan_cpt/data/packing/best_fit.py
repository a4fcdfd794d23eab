"""Best-fit-decreasing packing of pieces of documents into sequences, in bulk: pieces of one length move together.

The longest piece comes first; each is put into the sequence with the least room in which it fits, and opens a new one
if it fits nowhere. Ties: the earlier piece first, and the sequence opened first. Source: Ding et al. 2024,
arXiv:2404.10830, section 3.

A sequence that takes a piece of length n has less room than any other that could take it, so it takes the following
pieces of the same length as well, room // n in all. Sequences with equal room are alike. So the algorithm moves from
class to class (`best_fit_moves`), about one move per length, however many documents there are; `assign` replays the
moves on arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Move(NamedTuple):
    """`sequences` sequences with `room` free tokens each take `each` pieces of `length` tokens.

    If room is the sequence length, the sequences are new.
    """

    length: int
    room: int
    sequences: int
    each: int


def best_fit_moves(pieces_by_length: NDArray[np.int64], seq_len: int) -> Iterator[Move]:
    """Yield the moves of best-fit-decreasing, in order.

    Args:
        pieces_by_length: number of pieces of each length, int64 [seq_len + 1]; none has length 0.
        seq_len: tokens of a sequence.
    """
    sequences = [0] * seq_len  # by room; rooms from `reached` on are on the stack
    reached = seq_len
    fitting: list[int] = []  # rooms of at least the current length that a sequence has: a stack, the least on top
    for length in np.flatnonzero(pieces_by_length)[::-1].tolist():
        fitting += [room for room in range(reached - 1, length - 1, -1) if sequences[room]]
        reached = length
        left = int(pieces_by_length[length])
        while left:
            room = fitting[-1] if fitting else seq_len
            each = min(room // length, left)
            taken = left // each
            if fitting:
                taken = min(taken, sequences[room])
                sequences[room] -= taken
                if not sequences[room]:
                    fitting.pop()
            yield Move(length, room, taken, each)
            left -= taken * each
            after = room - each * length
            sequences[after] += taken
            if after >= length:  # the last piece of this length left room for another one
                fitting.append(after)


def count_best_fit(pieces_by_length: NDArray[np.int64], seq_len: int) -> int:
    """Return the number of sequences that best-fit-decreasing fills; arguments of `best_fit_moves`."""
    return sum(move.sequences for move in best_fit_moves(pieces_by_length, seq_len) if move.room == seq_len)


def assign(lengths: NDArray[np.integer[Any]], seq_len: int) -> tuple[NDArray[np.int32], int]:
    """Return the sequence of each piece, int32 [n], and the number of sequences, numbered in the order of opening.

    Args:
        lengths: length of each piece, [n] with n < 2**31, each in [1, seq_len].
        seq_len: tokens of a sequence.
    """
    pieces_by_length = np.bincount(lengths, minlength=seq_len + 1)
    longest_first = stable_order(seq_len - lengths, seq_len)
    waiting: list[list[NDArray[np.int32]]] = [[] for _ in range(seq_len)]  # sequences by room
    sequence_of = np.empty(len(lengths), np.int32)
    opened = 0
    done = 0
    for length, room, taken, each in best_fit_moves(pieces_by_length, seq_len):
        if room == seq_len:
            chosen = np.arange(opened, opened + taken, dtype=np.int32)
            opened += taken
        else:
            if len(waiting[room]) > 1:  # the room is complete once pieces fit into it: no sequence is added later
                waiting[room] = [np.sort(np.concatenate(waiting[room]))]
            chosen, waiting[room][0] = np.split(waiting[room][0], [taken])
        pieces = longest_first[done : done + taken * each]
        done += taken * each
        sequence_of[pieces] = np.repeat(chosen, each)
        waiting[room - each * length].append(chosen)
    return sequence_of, opened


def stable_order(keys: NDArray[np.integer[Any]], highest: int) -> NDArray[np.int64]:
    """Return the permutation that sorts keys in [0, highest], int64 [n]; equal keys keep their order.

    numpy sorts 16-bit keys in linear time (radix sort), so wider keys are sorted by 16 bits at a time.
    """
    order = np.argsort(keys.astype(np.uint16), kind="stable")  # the low 16 bits
    shift = 16
    while highest >> shift:
        high = (keys >> shift).astype(np.uint16)
        order = order[np.argsort(high[order], kind="stable")]
        shift += 16
    return order
