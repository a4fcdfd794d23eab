"""Continued merges are those of the plain algorithm that counts all pairs anew before each merge."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.data.tokenizer.continue_bpe import Merge, continued_merges

LETTERS = {0: "a", 1: "b", 2: "c", 3: "ab"}
WORDS = st.lists(st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 4)), max_size=8)


def plain_merges(words, texts, count, first_id):
    """The most frequent pair again and again, every count from the words as they are."""
    words, written, merges = [(list(ids), number) for ids, number in words], dict(texts), []
    while len(merges) < count:
        counts = Counter()
        for ids, number in words:
            for pair in pairwise(ids):
                counts[pair] += number
        taken = {*written.values()}
        allowed = [
            (-number, pair)
            for pair, number in counts.items()
            if number > 1 and {*pair} <= written.keys() and written[pair[0]] + written[pair[1]] not in taken
        ]
        if not allowed:
            break
        negative, (left, right) = min(allowed)
        new = first_id + len(merges)
        merges.append(Merge(left, right, new, -negative))
        written[new] = written[left] + written[right]
        words = [(merged(ids, (left, right), new), number) for ids, number in words]
    return merges


def merged(ids, pair, new):
    """A word with a pair replaced, from left to right."""
    found = []
    while ids:
        is_pair = tuple(ids[:2]) == pair
        found.append(new if is_pair else ids[0])
        ids = ids[2 if is_pair else 1 :]
    return found


@given(WORDS, st.integers(0, 12))
def test_the_merges_are_those_of_the_plain_algorithm(words, count):
    """Id 4 has no text, as an unknown token: it is never merged."""
    assert continued_merges(words, LETTERS, count, first_id=5) == plain_merges(words, LETTERS, count, 5)


def test_merges_by_hand():
    """bc occurs 5 times and ab 3 times, but "ab" has an id already; then a with bc, twice."""
    words = [([0, 1, 2], 2), ([1, 2], 3), ([0, 1], 1)]
    assert continued_merges(words, LETTERS, 9, first_id=5) == [Merge(1, 2, 5, 5), Merge(0, 5, 6, 2)]


def test_a_rejected_pair_is_never_merged():
    words = [([0, 1, 2], 5), ([1, 2], 3)]
    rejected = []

    def accept(text, pieces):
        rejected.append((text, pieces))
        return text != "bc"

    assert continued_merges(words, LETTERS, 9, first_id=5, accept=accept) == []
    assert rejected == [("bc", (1, 2))]
