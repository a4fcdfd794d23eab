"""Sizes in bytes, and evenly spaced indices. Expected values are from a hand calculation."""

import numpy as np
import pytest

from titan_cpt.common.numbers import evenly_spaced, parse_bytes, parse_tokens
from titan_cpt.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GiB", 80 * 2**30),
        ("5 gib", 5 * 2**30),
        ("1.5 KiB", 1536),
        ("40GB", 40 * 10**9),
        ("1.5GB", 1_500_000_000),
        ("300 mb", 3 * 10**8),
        ("2T", 2 * 10**12),
        ("7", 7),
        ("7B", 7),
    ],
)
def test_a_size_in_bytes_takes_powers_of_1024_with_an_i_and_of_1000_without(text, expected):
    """As Hugging Face and the sizes of GPUs are written."""
    assert parse_bytes(text, option="--max-shard-size") == expected


@pytest.mark.parametrize("text", ["", "GB", "GiB", "0GB", "0GiB", "-1", "80 gigs", "5iB", "1e9"])
def test_what_is_not_a_size_is_refused_with_the_name_of_the_option(text):
    """And with an example of each kind."""
    with pytest.raises(ConfigError, match='--device-memory: must be a size in bytes such as "5GB" or "80GiB"'):
        parse_bytes(text, option="--device-memory")


@pytest.mark.parametrize(
    ("available", "wanted", "indices"),
    [
        (10, 5, [1, 3, 5, 7, 9]),
        (7, 3, [1, 3, 5]),
        (100, 1, [50]),
        (100, 4, [12, 37, 62, 87]),
        (3, 64, [0, 1, 2]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_indices_are_the_middles_of_equal_parts(available, wanted, indices):
    """All of them where fewer are available than wanted."""
    assert evenly_spaced(available, wanted) == indices


def test_indices_are_distinct_and_evenly_spaced():
    """Over many sizes: distinct, in range, and the gaps between neighbours differ by one at most."""
    for available in (64, 65, 127, 1000, 10**9 + 7):
        gaps = np.diff(evenly_spaced(available, 64))

        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1
        assert 0 <= evenly_spaced(available, 64)[0] < evenly_spaced(available, 64)[-1] < available


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("300B", 300_000_000_000),
        ("2.5M", 2_500_000),
        ("1_000_000", 1_000_000),
        ("1.5K", 1500),
        ("3 T", 3 * 10**12),
        (" 7 ", 7),
        ("0.001K", 1),
    ],
)
def test_token_suffixes_are_powers_of_1000(text, tokens):
    """300B is exactly 300 x 10^9."""
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "B", "300b", "3e9", "-3B", "1.5", "0.0001K", "3BB", "3.B", "1,000", "9000000000T"]
)
def test_other_token_strings_are_refused(text):
    """A small letter, an exponent, a sign, a fraction of a token: nothing is guessed."""
    with pytest.raises(ValueError, match=r"must be a (whole )?number of tokens"):
        parse_tokens(text)
