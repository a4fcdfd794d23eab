"""Which sequence is the i-th of a stage: (stage, index) -> (source, ordinal), exact, seekable and pure.

A mixture is a binary tree. A fork with share p sends R(k) = floor(k p + 1/2) of its first k items to the left, in
exact rational arithmetic, so that any k is reached without walking there. The root forks replay from new data: its
count is never off by more than half a sequence. Below it stand Huffman trees over the sources, in which an inner
child's share is at most 2/3; a source's count therefore misses its exact share by less than

    1/2 + p (1/2 + 2/3 (1/2 + 2/3 (...))) < 1/2 + 3/2 p <= 2 sequences in every prefix of the stage.

An ordinal counts the sequences of one source in the order of their first sight: ordinal o is in epoch o // n of a
source with n sequences. New data takes up the ordinals where the last stage left them; replay walks over the ordinals
that were trained on, from 0, and goes on in the next stage where it ended in this one.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from titan_cpt.data.permutation import permuted

_BITS = 512  # of a fraction that is kept exactly


@dataclass(frozen=True)
class Leaf:
    """A source as one stage draws from it.

    Attributes:
        source: its name, `dataset` or `dataset.domain`.
        replayed: drawn as replay rather than as new data.
        first: ordinal (new) or replay position (replayed) of the stage's first draw.
        seen: for replay, how many ordinals there are to draw from; None where the data is not there to count.
        reshuffle_key: for replay, the key of the new order; empty for the order of first sight.
    """

    source: str
    replayed: bool
    first: int = 0
    seen: int | None = None
    reshuffle_key: str = ""


@dataclass(frozen=True)
class Fork:
    """Sends floor(k * share + 1/2) of its first k items to the left."""

    share: Fraction
    left: Tree
    right: Tree


Tree = Leaf | Fork


@dataclass(frozen=True)
class Draw:
    """One sequence of a stage: which source, and which of its sequences in the order of first sight."""

    source: str
    ordinal: int
    replayed: bool


def round_fraction(number: Fraction) -> Fraction:
    """The number itself, or, where its denominator has more than 512 bits, the nearest multiple of 2**-512.

    Fractions that are made of fractions stage after stage double their digits each time. An error of 2**-512 moves no
    sequence: `huffman_tree` takes ratios for what they are, and floor(k p + 1/2) has ties only where p is a simple
    ratio.
    """
    if number.denominator.bit_length() <= _BITS:
        return number
    return Fraction(((number.numerator << (_BITS + 1)) + number.denominator) // (2 * number.denominator), 1 << _BITS)


def huffman_tree(weights: Mapping[Leaf, Fraction]) -> Tree:
    """A Huffman tree over the leaves; the weights, all positive, are relative. Ties go by name, not by order.

    Weights may be off by less than 2**-400 of their sum: the tree is that of the exact ones.
    """
    total = sum(weights.values())
    heap = [(_rank(weight, total), leaf.source, weight, leaf) for leaf, weight in weights.items()]
    queue: list[tuple[int, str, Fraction, Tree]] = [*heap]
    heapq.heapify(queue)
    while len(queue) > 1:
        _, light_name, light, light_tree = heapq.heappop(queue)
        _, heavy_name, heavy, heavy_tree = heapq.heappop(queue)
        both = light + heavy
        fork = Fork(_simple(light / both), light_tree, heavy_tree)
        heapq.heappush(queue, (_rank(both, total), min(light_name, heavy_name), both, fork))
    return queue[0][3]


def _rank(weight: Fraction, total: Fraction | int) -> int:
    """Integers in the order of the weights; weights that differ only by an error of `round_fraction` are equal."""
    share = weight / total
    return ((share.numerator << 301) + share.denominator) // (2 * share.denominator)


def _simple(share: Fraction) -> Fraction:
    """The ratio of integers below 2**64 that a share stands for, where there is one: two stages' counts, or weights."""
    if share.denominator.bit_length() <= _BITS // 2:
        return share
    ratio = share.limit_denominator(1 << 64)
    return ratio if abs(share - ratio) * (1 << 300) < 1 else share


def leaf_counts(tree: Tree, items: int) -> dict[Leaf, int]:
    """How many of the first `items` each leaf gets; they add up to `items`."""
    if isinstance(tree, Leaf):
        return {tree: items}
    left = _to_the_left(tree.share, items)
    return leaf_counts(tree.left, left) | leaf_counts(tree.right, items - left)


def leaves(tree: Tree) -> list[Leaf]:
    """All leaves, from left to right."""
    return [tree] if isinstance(tree, Leaf) else [*leaves(tree.left), *leaves(tree.right)]


def draws(tree: Tree, start: int, stop: int) -> list[Draw]:
    """The sequences with indices [start, stop) of the stage, in order."""
    return [Draw(leaf.source, _ordinal(leaf, k), leaf.replayed) for leaf, k in _taken(tree, start, stop)]


def _to_the_left(share: Fraction, items: int) -> int:
    return (2 * items * share.numerator + share.denominator) // (2 * share.denominator)


def _taken(tree: Tree, start: int, stop: int) -> Sequence[tuple[Leaf, int]]:
    """(leaf, how many that leaf had before) for each item in [start, stop).

    A run of consecutive items is a run of consecutive items on either side of a fork, so both sides are found at once
    and merged; which side comes next is read off the remainder of k p + 1/2, one addition an item.
    """
    if isinstance(tree, Leaf):
        return [(tree, k) for k in range(start, stop)]
    left_start, left_stop = _to_the_left(tree.share, start), _to_the_left(tree.share, stop)
    left = iter(_taken(tree.left, left_start, left_stop))
    right = iter(_taken(tree.right, start - left_start, stop - left_stop))
    step, whole = 2 * tree.share.numerator, 2 * tree.share.denominator
    remainder = (step * start + tree.share.denominator) % whole
    merged = []
    for _ in range(start, stop):
        remainder += step
        if remainder >= whole:
            remainder -= whole
            merged.append(next(left))
        else:
            merged.append(next(right))
    return merged


def _ordinal(leaf: Leaf, k: int) -> int:
    """The leaf's k-th draw. Replay that the plan allowed to repeat begins a new round of what was seen."""
    if not leaf.replayed or leaf.seen is None:
        return leaf.first + k
    rounds, place = divmod(leaf.first + k, leaf.seen)
    if not leaf.reshuffle_key:
        return place
    return int(permuted(np.array([place]), leaf.seen, f"{leaf.reshuffle_key}/{rounds}")[0])
