"""Numbers for people: right to the digits shown, and never wider than their column, whatever the value."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.common import readable

ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
DECADES = st.builds(lambda digits, exponent: digits * 10.0**exponent, st.floats(-10, 10), st.integers(-300, 300))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m00s"),
        (320, "5m20s"),
        (3600, "1h00m"),
        (3 * 3600 + 7 * 60, "3h07m"),
        (2 * 86_400 + 4 * 3600, "2d04h"),
        (120 * 86_400, "120d"),
        (1e12, ">9999d"),
        (math.nan, "?"),
        (math.inf, "?"),
        (-1, "?"),
    ],
)
def test_durations_have_two_units(seconds, text):
    """The larger one decides; months and years are days."""
    assert readable.duration(seconds) == text


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (0, "0"),
        (987, "987"),
        (9_876.4, "9,876"),
        (9_999.6, "10.0K"),
        (12_345, "12.3K"),
        (999_600, "1.00M"),
        (1.23e6, "1.23M"),
    ],
)
def test_rates_have_three_digits_or_four(tokens, text):
    """A debug model on a laptop and a 10B model on a cluster."""
    assert readable.rate(tokens) == text


@pytest.mark.parametrize(
    ("gib", "text"),
    [(0.05, "51MiB"), (0.53, "0.53GiB"), (42.13, "42.1GiB"), (99.96, "100GiB"), (141.0, "141GiB"), (1500, "1.46TiB")],
)
def test_memory_is_in_powers_of_1024(gib, text):
    """From a debug model to a node."""
    assert readable.memory(gib) == text


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (2.5, "2.5000"),
        (10.82465, "10.8247"),
        (99.99999, "100.000"),
        (123456.0, "123456"),
        (-0.5, "-0.5000"),
        (math.nan, "nan"),
    ],
)
def test_losses_have_four_decimals_if_they_fit(loss, text):
    """In seven characters."""
    shown = readable.loss(loss)
    assert shown == text or (len(shown) <= 7 and math.isclose(float(shown), loss, rel_tol=0.05))


@given(ANY_FLOAT | DECADES)
def test_no_number_is_wider_than_its_column(value):
    """Losses, norms, rates, LRs, memory, shares and durations; NaN and infinities too."""
    shown = {
        "loss": (readable.loss(value), 7),
        "significant": (readable.significant(value, 9), 9),
        "scientific": (readable.scientific(value), 8),
        "memory": (readable.memory(value), 7),
        "share": (readable.share(value), 4),
        "duration": (readable.duration(value), 6),
        "rate": (readable.rate(value), 6),
    }

    assert {name: text for name, (text, width) in shown.items() if len(text) > width} == {}


@given(st.integers(0, 10**15))
def test_counts_are_right_to_their_digits(count):
    """Steps within half a percent; the short form within half of its fourth digit."""
    factors = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}

    def value(text):
        return float(text.rstrip("KMBT").replace(",", "")) * factors.get(text[-1], 1)

    assert len(readable.steps(count)) <= 9
    assert math.isclose(value(readable.steps(count)), count, rel_tol=0.0051)
    assert math.isclose(value(readable.shortest_count(count)), count, rel_tol=0.00051)


@given(st.floats(1e-30, 1e30))
def test_losses_and_norms_keep_their_value(value):
    """The first digit at least, and two or more between 1e-9 and 1e9."""
    tolerance = 0.06 if 1e-4 < value < 1e9 else 0.51

    assert math.isclose(float(readable.significant(value, 9)), value, rel_tol=0.0051)
    assert math.isclose(float(readable.loss(value)), value, rel_tol=tolerance, abs_tol=0.5e-4)
    assert math.isclose(float(readable.scientific(value)), value, rel_tol=0.0051)
