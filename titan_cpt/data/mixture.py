"""Mixture of new data and replay: which sequence is the i-th of a training stage, as a pure function of i.

Megatron's blended dataset builds an index of every sample at the start. Here a mixture is a binary tree, and any
position is computed from it directly, so a run resumes at any step without an index or a saved loader state.

A fork with share p sends

    R(k) = floor(k p + 1/2)

of its first k sequences to its left child and k - R(k) to its right one, in exact rational arithmetic. The root splits
replay from new data, so in every prefix of the stage the number of replayed sequences is within half a sequence of its
exact share. Below the root, a Huffman tree over the sources (planning/stages/ computes their weights) keeps
every inner child's share at or below 2/3. A source's count is therefore off its exact share by less than

    1/2 + p (1/2 + 2/3 (1/2 + 2/3 (...))) < 1/2 + 3/2 p <= 2 sequences    in every prefix of the stage.

A source is a dataset or one domain of it. An ordinal numbers the sequences of a source in the order in which they are
first trained on: in a source of n sequences, ordinal o belongs to epoch o // n. New data continues at the ordinal where
the previous stage stopped. Replay starts at ordinal 0, reads only ordinals that were trained on, and in the next stage
continues where it stopped in this one, so each stage replays fresh sequences. trained_text.py has replay after a change
of the sequence length.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from titan_cpt.data.permutation import permuted
from titan_cpt.data.trained_text import ReplayedText, TrainedPart

_BITS = 512  # largest denominator of an exact fraction, in bits


@dataclass(frozen=True)
class Leaf:
    """A source of one stage, either as new data or as replay.

    Attributes:
        source: name of the source, `dataset` or `dataset.domain`.
        replayed: whether its sequences are replayed; otherwise they are new data.
        first: position of the stage's first draw: an ordinal for new data, a replay position for replay.
        seen: for replay, the number of ordinals to draw from; None if the files do not exist yet.
        reshuffle_key: for replay, the key of its permutation; empty to replay in the order of the first training.
        text: for replay of sequences that were trained on with other lengths, in place of the three fields above.
    """

    source: str
    replayed: bool
    first: int = 0
    seen: int | None = None
    reshuffle_key: str = ""
    text: ReplayedText | None = None


@dataclass(frozen=True)
class Fork:
    """A split of a mixture: floor(k * share + 1/2) of its first k sequences come from the left child."""

    share: Fraction
    left: Tree
    right: Tree


Tree = Leaf | Fork


@dataclass(frozen=True)
class Draw:
    """One sequence of a stage.

    Attributes:
        source: name of the source, `dataset` or `dataset.domain`.
        ordinal: its ordinal in the source; that of the first part if it has parts.
        replayed: whether it is replayed; otherwise it is new data.
        parts: the parts of trained sequences that make it up; empty for a whole sequence of the stage's length.
    """

    source: str
    ordinal: int
    replayed: bool
    parts: tuple[TrainedPart, ...] = ()


def round_fraction(number: Fraction) -> Fraction:
    """Round to the nearest multiple of 2**-512 if the denominator has more than 512 bits; otherwise return `number`.

    Weights are computed from the weights of earlier stages, and exact fractions would double their digits with each
    stage. An error of 2**-512 changes no draw: `huffman_tree` recovers simple ratios (`_recover_ratio`), and
    floor(k p + 1/2) has ties only if p is a simple ratio.
    """
    if number.denominator.bit_length() <= _BITS:
        return number
    return Fraction(((number.numerator << (_BITS + 1)) + number.denominator) // (2 * number.denominator), 1 << _BITS)


def huffman_tree(weights: Mapping[Leaf, Fraction]) -> Tree:
    """Build the Huffman tree of the leaves from their weights, which are positive and relative to their sum.

    Ties are broken by the name of the source, so the order of the tables in the TOML does not matter. Weights may
    differ from the exact ones by up to 2**-400 of their sum; the tree is the same.
    """
    total = sum(weights.values())
    heap = [(_sort_key(weight, total), leaf.source, weight, leaf) for leaf, weight in weights.items()]
    queue: list[tuple[int, str, Fraction, Tree]] = [*heap]
    heapq.heapify(queue)
    while len(queue) > 1:
        _, light_name, light, light_tree = heapq.heappop(queue)
        _, heavy_name, heavy, heavy_tree = heapq.heappop(queue)
        both = light + heavy
        fork = Fork(_recover_ratio(light / both), light_tree, heavy_tree)
        heapq.heappush(queue, (_sort_key(both, total), min(light_name, heavy_name), both, fork))
    return queue[0][3]


def _sort_key(weight: Fraction, total: Fraction | int) -> int:
    """A weight as an integer to sort by; weights that differ only by the error of `round_fraction` get the same one."""
    share = weight / total
    return ((share.numerator << 301) + share.denominator) // (2 * share.denominator)


def _recover_ratio(share: Fraction) -> Fraction:
    """Undo `round_fraction`: the ratio of integers below 2**64 closest to `share`, if it is within rounding error."""
    if share.denominator.bit_length() <= _BITS // 2:
        return share
    ratio = share.limit_denominator(1 << 64)
    return ratio if abs(share - ratio) * (1 << 300) < 1 else share


def leaf_counts(tree: Tree, items: int) -> dict[Leaf, int]:
    """Number of sequences that each leaf contributes to the first `items` of a stage; the sum is `items`."""
    if isinstance(tree, Leaf):
        return {tree: items}
    left = _left_count(tree.share, items)
    return leaf_counts(tree.left, left) | leaf_counts(tree.right, items - left)


def leaves(tree: Tree) -> list[Leaf]:
    """Return all leaves, from left to right."""
    return [tree] if isinstance(tree, Leaf) else [*leaves(tree.left), *leaves(tree.right)]


def draws(tree: Tree, start: int, stop: int) -> list[Draw]:
    """Return the draws of the sequences [start, stop) of the stage, in order."""
    return [_draw(leaf, k) for leaf, k in _leaf_items(tree, start, stop)]


def _left_count(share: Fraction, items: int) -> int:
    return (2 * items * share.numerator + share.denominator) // (2 * share.denominator)


def _leaf_items(tree: Tree, start: int, stop: int) -> Sequence[tuple[Leaf, int]]:
    """For each item in [start, stop): its leaf, and the number of earlier items of that leaf.

    Consecutive items of a fork are consecutive items of each child. So both children are expanded once and merged; the
    remainder of k p + 1/2, updated with one addition per item, says which child comes next.
    """
    if isinstance(tree, Leaf):
        return [(tree, k) for k in range(start, stop)]
    left_start = _left_count(tree.share, start)
    left_stop = _left_count(tree.share, stop)
    left = iter(_leaf_items(tree.left, left_start, left_stop))
    right = iter(_leaf_items(tree.right, start - left_start, stop - left_stop))
    increment = 2 * tree.share.numerator
    modulus = 2 * tree.share.denominator
    remainder = (increment * start + tree.share.denominator) % modulus
    merged = []
    for _ in range(start, stop):
        remainder += increment
        if remainder >= modulus:
            remainder -= modulus
            merged.append(next(left))
        else:
            merged.append(next(right))
    return merged


def _draw(leaf: Leaf, k: int) -> Draw:
    if leaf.text is None:
        return Draw(leaf.source, _ordinal(leaf, k), leaf.replayed)
    parts = leaf.text.row(k)
    is_sequence = len(parts) == 1 and parts[0].is_whole
    return Draw(leaf.source, parts[0].ordinal, leaf.replayed, () if is_sequence else parts)


def _ordinal(leaf: Leaf, k: int) -> int:
    """Ordinal of the leaf's k-th draw. Replay that the plan allows to repeat starts over after `seen` ordinals."""
    if not leaf.replayed or leaf.seen is None:
        return leaf.first + k
    round_number, position = divmod(leaf.first + k, leaf.seen)
    if not leaf.reshuffle_key:
        return position
    return int(permuted(np.array([position]), leaf.seen, f"{leaf.reshuffle_key}/{round_number}")[0])
