"""Mixtures by tokens: weights proportional to tokens^temperature, and no dataset repeated more often than allowed."""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plans import datasets, stage

from titan_cpt.errors import PlanError
from titan_cpt.planning.stages.token_weights import UNITS, in_units, scaled_power, water_filled

SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 10**13), min_size=1)
SIZED = {"pile": 12_000, "german": 3_000}
NAMES = '{ of = ["pile", "german"], by = "tokens"'


@given(st.integers(1, 10**14))
def test_the_power_is_exact(tokens):
    """The square root is the integer one of tokens * 10^36, to a unit of 10^-18; exponents 0 and 1 are exact."""
    assert abs(scaled_power(tokens, 0.5) - math.isqrt(tokens * 10**36)) <= 1
    assert scaled_power(tokens, 0.0) == 10**18
    assert scaled_power(tokens, 1.0) == tokens * 10**18
    assert abs(scaled_power(tokens**4, 0.25) - tokens * 10**18) <= 1


@given(SIZES, st.data())
def test_water_filling_is_the_one_level_that_fits(powers, data):
    """Sum 1; each weight is its cap or the level times its power, and no weight is above either."""
    caps = {name: Fraction(data.draw(st.integers(1, 1000)), 1000) for name in powers}
    assume(sum(caps.values()) >= 1)
    weights = water_filled(powers, caps)
    levels = {weights[name] / powers[name] for name in powers if weights[name] < caps[name]}

    assert sum(weights.values()) == 1
    assert all(0 < weights[name] <= caps[name] for name in powers)
    assert len(levels) <= 1
    assert all(weights[name] <= level * powers[name] for name in powers for level in levels)


@given(SIZES, st.data())
def test_rounding_to_billionths_keeps_the_sum_and_the_caps(powers, data):
    """Each weight moves by less than two units; a cap is kept where another dataset can take the unit."""
    caps = {name: Fraction(data.draw(st.integers(1, 1000)), 997) for name in powers}
    assume(sum(caps.values()) > 1 + Fraction(len(caps), UNITS))
    weights = water_filled(powers, caps)
    rounded = in_units(weights, caps)

    assert sum(rounded.values()) == 1
    assert all(weight * UNITS == int(weight * UNITS) for weight in rounded.values())
    assert all(abs(rounded[name] - weights[name]) * UNITS < 2 for name in powers)
    assert all(rounded[name] <= caps[name] + Fraction(1, UNITS) for name in powers)


@pytest.mark.parametrize("epochs", [2.2, 2.5, 4, 10])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.5, 1.0])
def test_no_dataset_is_repeated_more_often_than_allowed(make, head, temperature, epochs):
    """In the plan of 100 steps (32,000 tokens, 2.13 epochs of all data), to two sequences of 16."""
    mixture = f"{NAMES}, temperature = {temperature}, max_epochs = {epochs} }}"
    (only,) = make(head + stage("a", mixture, 100), tokens=SIZED).stages

    assert sum(only.shares.values()) == 1
    assert all(use.tokens - 2 * 16 <= SIZED[name] * epochs for name, use in only.use_by_dataset.items())


def test_more_epochs_than_allowed_are_refused(make, head):
    """15,000 tokens twice are fewer than 32,000."""
    with pytest.raises(PlanError, match=r"allows 30,000 tokens .* needs 32,000 new ones: raise max_epochs"):
        make(head + stage("a", f"{NAMES}, max_epochs = 2 }}", 100), tokens=SIZED)


def test_equal_recipes_of_a_mixture_by_tokens_and_of_its_weights(make, head):
    """The recipe stores the weights: writing them out is the same plan; a temperature of 0 is equal weights."""
    by_tokens = make(head + stage("a", NAMES + ", temperature = 0.5 }", 10), tokens=SIZED)
    weights = {name: Fraction(text) for name, text in by_tokens.stages[0].recipe["dataset"].items()}
    written = "{ " + ", ".join(f"{name} = {float(weight)!r}" for name, weight in weights.items()) + " }"

    assert make(head + stage("a", written, 10), tokens=SIZED).fingerprint == by_tokens.fingerprint
    assert weights["pile"] / weights["german"] == pytest.approx(2, rel=1e-6)
    equal = make(head + stage("a", NAMES + ", temperature = 0 }", 10), tokens=SIZED).stages[0].recipe["dataset"]
    assert equal == {"german": "1/2", "pile": "1/2"}


def test_replay_takes_no_part_of_the_bound(make, head):
    """Three quarters of 100 steps are new data; the weights are those of a stage of 75 steps without replay."""
    first = stage("first", "pile", 50)
    mixture = '{ of = ["german", "split1"], by = "tokens", temperature = 0.3, max_epochs = 1 }'
    raw, sizes = head + datasets("split1"), {"pile": 40_000, "german": 4_000, "split1": 30_000}
    replayed = make(raw + first + stage("b", mixture, 100, replay="{ fraction = 0.25 }"), tokens=sizes)
    alone = make(raw + first + stage("b", mixture, 75), tokens=sizes)

    assert replayed.stages[1].recipe["dataset"] == alone.stages[1].recipe["dataset"]
    assert alone.stages[1].use_by_dataset["german"].epochs == pytest.approx(1, abs=0.01)


def test_data_that_does_not_exist_yet_has_no_weights(make, head):
    """The message says what to do."""
    raw = head + datasets("absent")
    with pytest.raises(PlanError, match=r"the weight of 'absent' depends on its number of tokens.*titan-cpt prepare"):
        make(raw + stage("a", '{ of = ["pile", "absent"], by = "tokens" }', 10), tokens={"pile": 1000})
