"""Continue the merges of a BPE on the words of a new text.

Isolated tokens that are added to a vocabulary may never be used, because no merge leads to them, and they compete with
the merges that there are. Continued merges begin where those of the base end (Purason et al. 2025, arXiv:2512.03989).
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[int, int]


@dataclass(frozen=True)
class Merge:
    """A merge: which two ids become which new id, and how often in the text."""

    left: int
    right: int
    product: int
    count: int


def continued_merges(
    words: Iterable[tuple[Sequence[int], int]],
    texts: Mapping[int, str],
    count: int,
    *,
    first_id: int,
    accept: Callable[[str, tuple[int, ...]], bool] = lambda text, pieces: True,
) -> list[Merge]:
    """Merge the most frequent pair of adjacent ids within the words, again and again.

    A pair whose text is in the vocabulary already is never merged: the same text would have two ways to one id, and
    replacing new ids by their pieces would no longer give the base's ids. Equal counts are decided by the smaller ids.

    Args:
        words: the ids of each distinct word, and how often it occurs.
        texts: the text of each id of the base, as the vocabulary writes it; ids without one are never merged.
        count: number of merges.
        first_id: id of the first new token.
        accept: called with a new token's text and pieces, the base's ids; False rejects the pair for good.

    Returns:
        `count` merges in order, or fewer if no pair occurs twice.
    """
    split: list[list[int]] = []
    frequency: list[int] = []
    for whole, number in words:
        split.append(list(whole))
        frequency.append(number)
    counts, places = _count_pairs(split, frequency)
    queue = [(-number, pair) for pair, number in counts.items()]
    heapq.heapify(queue)
    known, written = {*texts.values()}, dict(texts)
    pieces: dict[int, tuple[int, ...]] = {}
    merges: list[Merge] = []
    while queue and len(merges) < count:
        negative, pair = heapq.heappop(queue)
        if -negative != counts.get(pair):  # an older count; the newer one is in the queue too
            continue
        if -negative < 2:
            break
        if pair[0] not in written or pair[1] not in written:
            continue
        text = written[pair[0]] + written[pair[1]]
        leaves = (*pieces.get(pair[0], pair[:1]), *pieces.get(pair[1], pair[1:]))
        if text in known or not accept(text, leaves):
            continue
        product = first_id + len(merges)
        merges.append(Merge(*pair, product, -negative))
        known.add(text)
        written[product], pieces[product] = text, leaves
        changed: set[Pair] = set()
        for place in places.pop(pair):
            _merge_in(split[place], pair, product, place, frequency[place], counts, places, changed)
        counts.pop(pair, None)
        for each in changed - {pair}:
            if counts[each]:
                heapq.heappush(queue, (-counts[each], each))
            else:
                counts.pop(each)
                places.pop(each, None)
    return merges


def _count_pairs(split: list[list[int]], frequency: list[int]) -> tuple[dict[Pair, int], dict[Pair, set[int]]]:
    """How often each pair of adjacent ids occurs in the text, and the places of the words that have it."""
    counts: dict[Pair, int] = defaultdict(int)
    places: dict[Pair, set[int]] = defaultdict(set)
    for place, ids in enumerate(split):
        for pair in itertools.pairwise(ids):
            counts[pair] += frequency[place]
            places[pair].add(place)
    return counts, places


def _merge_in(
    ids: list[int],
    pair: Pair,
    product: int,
    place: int,
    frequency: int,
    counts: dict[Pair, int],
    places: dict[Pair, set[int]],
    changed: set[Pair],
) -> None:
    """Merge a pair in one word, from left to right, and correct the counts of all pairs in it."""
    before = list(itertools.pairwise(ids))
    merged: list[int] = []
    position = 0
    while position < len(ids):
        if tuple(ids[position : position + 2]) == pair:
            merged.append(product)
            position += 2
        else:
            merged.append(ids[position])
            position += 1
    ids[:] = merged
    after = list(itertools.pairwise(ids))
    for each in before:
        counts[each] -= frequency
    for each in after:
        counts[each] += frequency
        places[each].add(place)
    for each in {*before} - {*after}:
        places[each].discard(place)
    changed.update(before, after)
