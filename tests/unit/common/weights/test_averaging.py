"""Coefficients of an average: the laws of the decay that it imitates, and when snapshots are taken."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.common.weights.averaging import Averaging

SHAPES = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def averaging(kind="like_decay", shape="sqrt", size=4, every=2, phase=0):
    """An average with some default for everything."""
    return Averaging(kind, shape, size, every, phase)


@given(shape=st.sampled_from(sorted(SHAPES)), count=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_the_average_has_the_updates_scaled_as_the_decay_would_scale_them(shape, count, seed):
    """sum c_j s_j = s_0 + sum f((i - 1) / m) (s_i - s_(i-1)), whatever s_0 is."""
    snapshots = np.random.default_rng(seed).normal(size=count + 1)
    updates = np.diff(snapshots)
    scaled = snapshots[0] + sum(SHAPES[shape](i / count) * update for i, update in enumerate(updates))
    coefficients = averaging(shape=shape).coefficients(count)

    assert np.dot(coefficients, snapshots[1:]) == pytest.approx(scaled, abs=1e-12)
    assert sum(coefficients) == pytest.approx(1, abs=1e-14)
    assert min(coefficients) >= 0


def test_coefficients_by_hand():
    """Four snapshots: f is 1, 1/2, 0.29289, 0.13397 for sqrt; 1, 0.85355, 0.5, 0.14645 for cosine."""
    assert averaging("mean").coefficients(4) == [0.25] * 4
    assert averaging(shape="linear").coefficients(4) == pytest.approx([0.25] * 4)
    assert averaging(shape="sqrt").coefficients(4) == pytest.approx([0.5, 0.20711, 0.15892, 0.13397], abs=1e-5)
    assert averaging(shape="cosine").coefficients(4) == pytest.approx([0.14645, 0.35355, 0.35355, 0.14645], abs=1e-5)
    assert averaging().coefficients(1) == [1.0]


@given(numbers=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), size=st.integers(1, 8))
def test_an_ema_is_a_mean_until_its_window_is_full(numbers, size):
    """And forgets at the rate 1 / K from then on."""
    shares = averaging("ema", size=size)
    average = 0.0
    for number, value in enumerate(numbers, 1):
        average += shares.ema_share(number) * (value - average)
        if number <= size:
            assert average == pytest.approx(np.mean(numbers[:number]), abs=1e-9)
    assert shares.ema_share(size + 5) == 1 / size


@given(every=st.integers(1, 20), anchor=st.integers(1, 200))
def test_snapshots_are_equally_spaced_and_one_is_at_the_anchor(every, anchor):
    """None before the first step."""
    due = [step for step in range(301) if averaging(every=every, phase=anchor % every).due(step)]

    assert anchor in due
    assert due == list(range(due[0], 301, every))
    assert 0 < due[0] <= every


def test_an_ema_needs_one_copy_and_its_settings_no_shape():
    """The manifest and the recipe of a stage that starts from it have what determines it."""
    assert (averaging("ema").stored, averaging("mean").stored) == (1, 4)
    assert averaging("ema").settings == {"kind": "ema", "size": 4, "every": 2}
    assert averaging().settings == {"kind": "like_decay", "shape": "sqrt", "size": 4, "every": 2}
