"""Curves of block characters: order and gaps are kept, one large first value does not flatten the rest."""

import math
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.reporting.watch.sparkline import bucket_means, carried_on, sparkline, to_ascii

FINITE = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([2.0, math.nan, 2.0], "▁ ▁"),
        ([], ""),
        ([math.nan], " "),
        ([100.0, *range(8, 0, -1), 1.0, 1.0, 1.0], "██▇▆▅▄▃▂▁▁▁▁"),
        ([1.0, math.inf, 2.0], "▁██"),
    ],
)
def test_the_lowest_value_is_the_lowest_block(values, line):
    """NaN is a gap; the first losses of a run are at the top with the largest tenth of the others."""
    assert sparkline(values) == line


@given(st.lists(FINITE | st.just(math.nan), max_size=50))
def test_larger_values_are_never_lower(values):
    """And every value has one character."""
    line = sparkline(values)
    drawn = sorted(
        (value, " ▁▂▃▄▅▆▇█".index(block)) for value, block in zip(values, line, strict=True) if value == value
    )

    assert len(line) == len(values)
    assert [height for _, height in drawn] == sorted(height for _, height in drawn)
    assert [block == " " for block in line] == [math.isnan(value) for value in values]


@given(
    st.lists(st.tuples(st.integers(1, 1000), FINITE), max_size=60, unique_by=lambda pair: pair[0]), st.integers(1, 40)
)
def test_a_mean_is_that_of_the_steps_of_its_part(pairs, width):
    """By the definition, for up to 64 steps in a part."""
    pairs.sort()
    means = bucket_means(
        array("q", [step for step, _ in pairs]), array("d", [value for _, value in pairs]), last_step=1000, width=width
    )
    limits = [0, *((part + 1) * 1000 // width for part in range(width))]
    for mean, low, high in zip(means, limits, limits[1:], strict=False):
        inside = [value for step, value in pairs if low < step <= high]
        assert math.isnan(mean) if not inside else math.isclose(mean, sum(inside) / len(inside), abs_tol=1e-6)


def test_a_million_steps_are_sampled():
    """A falling line stays a falling line."""
    steps = array("q", range(1, 1_000_001))
    means = bucket_means(steps, array("d", [1e6 - step for step in steps]), last_step=1_000_000, width=30)

    assert means == sorted(means, reverse=True)
    assert math.isclose(means[0], 1e6 - 1e6 / 60, rel_tol=0.01)


def test_a_loss_holds_until_it_is_measured_again():
    """Not before the first measurement, not after the last."""
    nan = math.nan

    assert str(carried_on([nan, 1.0, nan, nan, 2.0, nan])) == str([nan, 1.0, 1.0, 1.0, 2.0, nan])


def test_terminals_without_utf_8_get_ascii():
    """Curves, bars and borders."""
    assert to_ascii("▁▂▃▄▅▆▇█│━─").isascii()
