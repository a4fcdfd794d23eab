"""The advised value: inside the limits, inside the trained values, and never outside of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_cpt.runs.laws.decisions import PredictedLoss, best_mixture, choose


def line(slope, at_zero, half=0.0):
    return PredictedLoss(lambda x: at_zero + slope * x, lambda x: np.full(len(x), half))


RISES, FALLS = line(1.0, 3.0, half=0.05), line(-1.0, 2.0)


def test_the_largest_value_that_keeps_the_limit_is_advised():
    """old rises to its limit 3.4 at 0.4; with losses 0.05 higher at 0.35, lower at 0.45."""
    choice = choose({"new": 1.0}, {"new": FALLS, "old": RISES}, {"old": 3.4}, [0.0, 0.5, 1.0])

    assert choice.value == pytest.approx(0.4, abs=3e-4)
    assert (choice.low, choice.high) == (pytest.approx(0.35, abs=3e-4), pytest.approx(0.45, abs=3e-4))
    assert not choice.at_edge
    assert choice.losses == {"new": pytest.approx(1.6, abs=3e-4), "old": pytest.approx(3.4, abs=3e-4)}


def test_a_limit_beyond_the_trained_values_is_not_extrapolated_to():
    """The highest trained value keeps it: that one, marked as the edge. No value keeps it: none."""
    curves = {"new": FALLS, "old": RISES}
    wide = choose({"new": 1.0}, curves, {"old": 9.0}, [0.0, 0.5])
    narrow = choose({"new": 1.0}, curves, {"old": 3.1}, [0.2, 0.5])

    assert (wide.value, wide.at_edge) == (0.5, True)
    assert (narrow.value, narrow.low) == (None, None)


@settings(max_examples=50, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(2.0, 4.0), st.lists(st.floats(0, 1), min_size=2, unique=True))
def test_the_advice_keeps_the_limit_and_is_a_trained_value(slope, goal, limit, trained):
    """Whatever the lines and the limit are."""
    choice = choose({"new": 1.0}, {"new": line(goal, 1), "old": line(slope, 3)}, {"old": limit}, trained)

    if choice.value is None:
        assert min(3 + slope * value for value in trained) > limit
    else:
        assert min(trained) <= choice.value <= max(trained)
        assert 3 + slope * choice.value <= limit + 1e-9


TRAINED = np.array([[0.8, 0.2], [0.2, 0.8]])


def test_the_best_mixture_is_a_combination_of_trained_ones():
    """The objective falls with the second share, so the unconstrained optimum (0, 1) is outside: (0.2, 0.8)."""
    free = best_mixture(lambda row: float(np.exp(-row[1])), [], TRAINED)
    limited = best_mixture(lambda row: float(np.exp(-row[1])), [lambda row: 0.5 - row[1]], TRAINED)
    capped = best_mixture(lambda row: float(np.exp(-row[1])), [], TRAINED, np.array([1.0, 0.4]))

    assert free == pytest.approx([0.2, 0.8], abs=1e-5)
    assert limited == pytest.approx([0.5, 0.5], abs=1e-5)
    assert capped == pytest.approx([0.6, 0.4], abs=1e-5)
    assert best_mixture(lambda row: 1.0, [lambda row: 0.1 - row[1]], TRAINED) is None
