"""The mixture: shares exact in every prefix, seekable, independent of the order of names; where replay continues."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.data.mixture import Draw, Fork, Leaf, draws, huffman_tree, leaf_counts, leaves, round_fraction

BATCH = 1104


def new_leaves(weights):
    return {Leaf(f"new{i}", False): weight for i, weight in enumerate(weights)}


def old_leaves(weights):
    return {Leaf(f"old{i}", True): weight for i, weight in enumerate(weights)}


WEIGHTS = st.lists(st.fractions(min_value=Fraction(1, 1000), max_value=1000), min_size=1, max_size=9)
SHARES = st.fractions(min_value=0, max_value=1)


@st.composite
def mixtures(draw):
    """(tree, {leaf: exact share}, replay fraction) with any number of sources on both sides."""
    new, old, fraction = new_leaves(draw(WEIGHTS)), old_leaves(draw(WEIGHTS)), draw(SHARES)
    shares = {leaf: weight / sum(new.values()) * (1 - fraction) for leaf, weight in new.items()}
    shares |= {leaf: weight / sum(old.values()) * fraction for leaf, weight in old.items()}
    return Fork(fraction, huffman_tree(old), huffman_tree(new)), shares, fraction


@given(mixtures())
def test_every_prefix_of_a_stage_has_the_exact_shares(mixture):
    """In each of the first 400 prefixes, replay is off by less than one sequence and each source by less than two."""
    tree, shares, fraction = mixture
    got = dict.fromkeys((leaf.source for leaf in shares), 0)
    off_replay, off_source, replayed = [], [], 0
    for n, draw in enumerate(draws(tree, 0, 400), 1):
        got[draw.source] += 1
        replayed += draw.replayed
        off_replay.append(abs(replayed - n * fraction))
        off_source.append(max(abs(got[leaf.source] - n * share) for leaf, share in shares.items()))

    assert max(off_replay) < 1
    assert max(off_source) < 2


@given(st.lists(st.integers(1, 12), min_size=2, max_size=9), st.integers(2, 10**9), st.randoms())
def test_rounding_weights_to_512_bits_changes_no_draw(ratios, scale, random):
    """Small ratios cause ties of weights and of positions; with errors of 2**-490 the tree is that of the exact
    weights.
    """
    exact = new_leaves([Fraction(ratio, 7 * scale) for ratio in ratios])
    rounded = {leaf: weight + weight * random.randint(-9, 9) / 2**490 for leaf, weight in exact.items()}

    assert huffman_tree(rounded) == huffman_tree(exact)


def test_a_fraction_is_kept_exactly_up_to_512_bits():
    """Longer ones are rounded to the nearest multiple of 2**-512."""
    short, long = Fraction(2, 3**300), Fraction(2, 3**330)

    assert round_fraction(short) == short
    assert round_fraction(long).denominator <= 2**512
    assert 0 < abs(round_fraction(long) - long) <= Fraction(1, 2**513)


@given(mixtures(), st.integers(0, 10**15))
def test_far_prefixes_have_the_exact_shares_too(mixture, items):
    """After 10^15 sequences the counts are still off by less than one and two."""
    tree, shares, fraction = mixture
    got = leaf_counts(tree, items)

    assert sum(got.values()) == items
    assert abs(sum(count for leaf, count in got.items() if leaf.replayed) - items * fraction) < 1
    assert all(abs(got[leaf] - items * share) < 2 for leaf, share in shares.items())


def test_a_long_chain_of_domains_keeps_every_share():
    """Weights 1, 2, 4, ... give the deepest tree: twelve forks, and every source is off by less than two sequences."""
    weights = {Leaf(f"domain{i:02}", False): Fraction(2**i) for i in range(13)}
    tree, total = huffman_tree(weights), sum(weights.values())
    worst = max(
        abs(count - items * weights[leaf] / total)
        for items in range(0, 9000, 7)
        for leaf, count in leaf_counts(tree, items).items()
    )

    assert worst < 2


def test_one_large_domain_beside_many_small_ones_keeps_its_share():
    """If twenty small domains round up at once, the large one still has its share."""
    weights = {Leaf("large", False): Fraction(980)} | {Leaf(f"small{i:02}", False): Fraction(1) for i in range(20)}
    tree = huffman_tree(weights)
    worst = max(
        abs(count - items * weights[leaf] / 1000)
        for items in range(3000)
        for leaf, count in leaf_counts(tree, items).items()
    )

    assert worst < 2


@given(mixtures(), st.integers(0, 300), st.integers(0, 300))
def test_seeking_gives_the_same_draws_as_reading_from_the_start(mixture, one, other):
    """draws(a, b) is the slice [a, b) of draws(0, n)."""
    tree, _, _ = mixture
    start, stop = sorted((one, other))

    assert draws(tree, start, stop) == draws(tree, 0, 300)[start:stop]


@given(mixtures(), st.integers(0, 10**12), st.integers(0, 50))
def test_draws_agree_with_the_difference_of_the_counts(mixture, start, number):
    """The number of draws of each source in a range is the difference of its counts at both ends, also far out."""
    tree, _, _ = mixture
    before, after = leaf_counts(tree, start), leaf_counts(tree, start + number)
    drawn = draws(tree, start, start + number)

    assert len(drawn) == number
    assert {leaf: sum(draw.source == leaf.source for draw in drawn) for leaf in leaves(tree)} == {
        leaf: after[leaf] - before[leaf] for leaf in leaves(tree)
    }


@given(mixtures(), st.integers(0, 500))
def test_counts_are_the_numbers_of_draws(mixture, items):
    """Each source's ordinals are 0, 1, 2, ... in the order of the draws."""
    tree, _, _ = mixture
    drawn = draws(tree, 0, items)

    for leaf, count in leaf_counts(tree, items).items():
        ordinals = [draw.ordinal for draw in drawn if draw.source == leaf.source]

        assert ordinals == list(range(count))


@given(WEIGHTS, st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_change_the_data_order(weights, random):
    """The same weights listed in another order give the same tree, equal weights included."""
    leaves_of = new_leaves([min(weight, Fraction(3)) for weight in weights])  # many ties
    shuffled = list(leaves_of.items())
    random.shuffle(shuffled)

    assert huffman_tree(dict(shuffled)) == huffman_tree(leaves_of)


@given(WEIGHTS, st.fractions(min_value=Fraction(1, 100), max_value=100))
def test_weights_are_relative(weights, factor):
    """Multiplying all weights by a factor gives the same tree."""
    scaled = huffman_tree(new_leaves([weight * factor for weight in weights]))

    assert scaled == huffman_tree(new_leaves(weights))


def test_five_per_cent_of_a_batch_is_55_or_56_sequences():
    """1104 x 5 % = 55.2: of every five batches four have 55 replayed sequences and one has 56, which are 276."""
    tree = Fork(Fraction(1, 20), Leaf("pile", True), Leaf("german", False))
    batches = [sum(draw.replayed for draw in draws(tree, i * BATCH, (i + 1) * BATCH)) for i in range(50)]

    assert set(batches) == {55, 56}
    assert [sum(batches[i : i + 5]) for i in range(0, 50, 5)] == [276] * 10


def test_replay_is_evenly_spread():
    """With a quarter of replay, every four consecutive sequences have exactly one replayed."""
    tree = Fork(Fraction(1, 4), Leaf("pile", True), Leaf("german", False))
    drawn = draws(tree, 0, 400)

    assert {sum(draw.replayed for draw in drawn[i : i + 4]) for i in range(0, 400, 4)} == {1}


def test_a_mixture_by_hand():
    """One fifth of replay: floor(k/5 + 1/2) increases at the third of every five sequences."""
    tree = Fork(Fraction(1, 5), Leaf("old", True), Leaf("new", False))

    assert [(draw.source, draw.ordinal) for draw in draws(tree, 0, 10)] == [
        ("new", 0),
        ("new", 1),
        ("old", 0),
        ("new", 2),
        ("new", 3),
        ("new", 4),
        ("new", 5),
        ("old", 1),
        ("new", 6),
        ("new", 7),
    ]


@pytest.mark.parametrize(("share", "side"), [(0, "new"), (1, "old")])
def test_shares_of_zero_and_one_are_exact(share, side):
    """A fork of share 0 or 1 never draws from the other child."""
    tree = Fork(Fraction(share), Leaf("old", True), Leaf("new", False))

    assert {draw.source for draw in draws(tree, 0, 1000)} == {side}


def test_new_data_continues_at_its_first_ordinal():
    """A leaf whose first ordinal is 700 draws 700, 701, ..., also past the end of an epoch."""
    drawn = draws(Leaf("pile", False, first=700), 5, 8)

    assert drawn == [Draw("pile", 705, False), Draw("pile", 706, False), Draw("pile", 707, False)]


def test_replay_continues_where_it_stopped_and_starts_over_after_the_last_seen_sequence():
    """Five were seen and three replayed: 3 and 4 follow, then the first again."""
    drawn = draws(Leaf("pile", True, first=3, seen=5), 0, 8)

    assert [draw.ordinal for draw in drawn] == [3, 4, 0, 1, 2, 3, 4, 0]
    assert all(draw.replayed for draw in drawn)


@given(st.integers(1, 60), st.integers(0, 200))
def test_reshuffled_replay_draws_every_seen_sequence_once_per_round(seen, first):
    """Each round is a permutation of the seen sequences, whatever was replayed before."""
    leaf = Leaf("pile", True, first=first, seen=seen, reshuffle_key="0/replay/pile")
    start = -first % seen  # the draw with which the next round begins

    assert sorted(draw.ordinal for draw in draws(leaf, start, start + seen)) == list(range(seen))


def test_every_round_of_reshuffled_replay_has_another_order():
    """Neither the order of the first training nor that of the previous round; the key determines it."""
    leaf = Leaf("pile", True, seen=100, reshuffle_key="0/replay/pile")
    rounds = [[draw.ordinal for draw in draws(leaf, i * 100, (i + 1) * 100)] for i in range(3)]
    other = [draw.ordinal for draw in draws(Leaf("pile", True, seen=100, reshuffle_key="1/replay/pile"), 0, 100)]

    assert len({tuple(order) for order in (*rounds, other, range(100))}) == 5


def test_leaves_are_listed_from_left_to_right():
    """Replay comes before new data."""
    tree = Fork(Fraction(1, 2), Leaf("a", True), Fork(Fraction(1, 2), Leaf("b", False), Leaf("c", False)))

    assert [leaf.source for leaf in leaves(tree)] == ["a", "b", "c"]
