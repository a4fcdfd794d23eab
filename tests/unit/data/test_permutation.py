"""The seeded permutation: every position once, another key another order, no pattern, errors."""

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.data.permutation import permuted


def order(size, key="key"):
    return permuted(np.arange(size), size, key)


@given(st.integers(1, 5000), st.text(max_size=8))
def test_every_position_is_hit_exactly_once(size, key):
    """A bijection of range(size), for every size and key."""
    assert np.array_equal(np.sort(order(size, key)), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 4**8, 4**8 + 1])
def test_sizes_around_powers_of_four_are_bijections(size):
    """Where the network is as large as the range, and where it is almost four times larger."""
    assert np.array_equal(np.sort(order(size)), np.arange(size))


@pytest.mark.parametrize("size", [2**40 + 12_345, 3 * 10**12, 2**61 + 1, 2**62])
def test_huge_ranges_have_distinct_images_inside_the_range(size):
    """Both ends and a hundred thousand positions between them; the images are spread over the whole range."""
    positions = np.unique(np.append(np.arange(100_000) * (size // 100_000), [1, 2, size - 2, size - 1]))
    images = permuted(positions, size, "key")

    assert np.unique(images).size == positions.size
    assert images.min() >= 0
    assert images.max() < size
    assert np.histogram(images, bins=10, range=(0, size))[0] == pytest.approx(positions.size / 10, rel=0.05)


@given(st.integers(1, 10**15), st.lists(st.integers(0, 10**15), max_size=20))
def test_an_image_does_not_depend_on_the_other_positions(size, positions):
    """One by one or all at once, positions have the same images, so any position can be computed directly."""
    positions = np.array([position % size for position in positions], dtype=np.int64)
    one_by_one = [int(permuted(positions[i : i + 1], size, "key")[0]) for i in range(positions.size)]

    assert permuted(positions, size, "key").tolist() == one_by_one


def one_image(position, size, key):
    """The same cipher in Python integers: six Feistel rounds over two halves, with cycle walking."""
    half = next(bits for bits in range(1, 32) if 4**bits >= size)
    digest = hashlib.blake2b(key.encode(), digest_size=48).digest()
    while True:
        left, right = divmod(position, 2**half)
        for round_key in struct.unpack("<6Q", digest):
            mixed = (right + round_key) % 2**64
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ (mixed ^ mixed >> 31) % 2**half
        position = left * 2**half + right
        if position < size:
            return position


@given(st.integers(1, 2**62), st.integers(0, 2**62), st.text(max_size=8))
def test_uint64_arithmetic_agrees_with_python_integers(size, position, key):
    """No overflow, sign or shift of 64-bit words changes the permutation."""
    position %= size

    assert permuted(np.array([position]), size, key).tolist() == [one_image(position, size, key)]


def test_the_permutation_never_changes_between_versions():
    """The data order of every run depends on these numbers, which `one_image` computes too."""
    assert order(10, "0/pile").tolist() == [3, 0, 8, 4, 5, 7, 2, 9, 6, 1]
    assert permuted(np.array([0, 1, 10**12]), 2 * 10**12, "0/pile").tolist() == [
        1_569_057_236_938,
        615_947_526_212,
        515_212_309_067,
    ]


def test_another_key_or_size_gives_another_order():
    """Two keys agree at about one position in a thousand, as do sizes of different networks; the same key agrees
    everywhere.
    """
    first, other, larger = order(1000, "0/pile/0"), order(1000, "0/pile/1"), order(5000, "0/pile/0")

    assert np.array_equal(first, order(1000, "0/pile/0"))
    assert (first == other).sum() < 10
    assert (first == larger[:1000]).sum() < 10


def test_neighbors_do_not_stay_neighbors():
    """The order has no drift, no runs and no correlation with the position."""
    images = order(20_000).astype(np.float64)
    correlation = np.corrcoef(np.arange(20_000), images)[0, 1]
    serial = np.corrcoef(images[:-1], images[1:])[0, 1]

    assert abs(correlation) < 0.03
    assert abs(serial) < 0.03
    assert (np.abs(np.diff(images)) == 1).sum() < 20


def test_consecutive_positions_are_spread_over_the_range():
    """500 consecutive positions fall into ten equal parts with about 50 each: chi squared stays below 40."""
    images = order(10_007)
    windows = images[:10_000].reshape(20, 500)
    counts = np.array([np.histogram(window, bins=10, range=(0, 10_007))[0] for window in windows])

    assert (((counts - 50) ** 2) / 50).sum(axis=1).max() < 40


def test_small_ranges_have_every_order():
    """All six orders of three items occur over 300 keys, none in more than a third of them."""
    seen = [tuple(order(3, str(key)).tolist()) for key in range(300)]
    tally = {one: seen.count(one) for one in set(seen)}

    assert len(tally) == 6
    assert max(tally.values()) < 100


@pytest.mark.parametrize(
    ("positions", "size", "expected"),
    [
        ([0], 0, r"size must be in \[1, 2\*\*62\], got 0"),
        ([0], -3, r"size must be in \[1, 2\*\*62\], got -3"),
        ([0], 2**62 + 1, r"size must be in \[1, 2\*\*62\]"),
        ([0, 5], 5, r"positions must be in \[0, 5\), got 0 to 5"),
        ([-1], 5, r"positions must be in \[0, 5\), got -1 to -1"),
    ],
)
def test_positions_and_sizes_out_of_range_are_refused(positions, size, expected):
    """Never a silent wrap."""
    with pytest.raises(ValueError, match=expected):
        permuted(np.array(positions), size, "key")


def test_an_empty_array_has_no_images():
    """An empty question has an empty answer."""
    assert permuted(np.array([], dtype=np.int64), 5, "key").tolist() == []
