"""The formulas of merging against the papers' own in numpy, written as the papers have them, and their laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.checkpoint.merge import methods

WHOLE = st.integers(-64, 64).map(lambda number: number / 16)  # sums of these are exact in float64
ANY = st.floats(-1e3, 1e3, width=32)


@st.composite
def models(draw, elements=ANY, at_least=1):
    """Some models of one shape, and a weight for each, from 1/16 to 4."""
    size = draw(st.integers(1, 6))
    values = draw(st.lists(st.lists(elements, min_size=size, max_size=size), min_size=at_least, max_size=5))
    weights = draw(st.lists(st.integers(1, 64), min_size=len(values), max_size=len(values)))
    return [np.array(row) for row in values], [weight / 16 for weight in weights]


def blocks_of(arrays):
    return [torch.from_numpy(array) for array in arrays]


def rounded(array):
    """What a merge writes."""
    return np.asarray(array, dtype=np.float64).astype(np.float32)


def close(found, expected, scale):
    """Equal, except for the rounding of numbers of this size in float64 and the last bit of float32."""
    allowed = 2.0**-23 * np.abs(expected) + 2.0**-45 * scale
    return bool((np.abs(rounded(found) - expected) <= allowed).all())


def largest(arrays):
    return 1 + max(np.abs(array).max() for array in arrays)


@given(models())
def test_a_weighted_mean_is_that_of_numpy(drawn):
    """numpy.average with weights."""
    arrays, weights = drawn

    assert close(
        methods.weighted_mean(blocks_of(arrays), weights),
        np.average(arrays, axis=0, weights=weights),
        largest(arrays),
    )


@given(models(at_least=2), st.sampled_from([0.5, 1.0, -0.25, 3.0]))
def test_task_arithmetic_is_the_paper_s_sum_of_task_vectors(drawn, scale):
    """base + scale * sum_i w_i tau_i with tau_i = theta_i - base (section 2); the first array is the base."""
    (base, *arrays), (_, *weights) = drawn
    vectors = [weight * (array - base) for array, weight in zip(arrays, weights, strict=True)]

    assert close(
        methods.task_arithmetic(*blocks_of([base]), blocks_of(arrays), weights, scale),
        base + scale * sum(vectors),
        100 * largest([base, *arrays]),
    )


def ties_as_published(base, arrays, weights, keep, scale):
    """Algorithm 1, one weight at a time: trim, elect sign, disjoint merge; magnitudes are compared in float32."""
    trimmed = []
    for array in arrays:
        vector = array - base
        magnitudes = np.abs(vector).astype(np.float32)
        smallest_kept = sorted(magnitudes, reverse=True)[keep - 1]
        trimmed.append(np.where(magnitudes >= smallest_kept, vector, 0.0))
    result = []
    for at, start in enumerate(base):
        total = math.fsum(weight * vector[at] for weight, vector in zip(weights, trimmed, strict=True))
        sign = (total > 0) - (total < 0)
        agreeing = [
            (weight, vector[at]) for weight, vector in zip(weights, trimmed, strict=True) if sign * vector[at] > 0
        ]
        mean = (
            math.fsum(weight * value for weight, value in agreeing) / math.fsum(weight for weight, _ in agreeing)
            if agreeing
            else 0.0
        )
        result.append(start + scale * mean)
    return np.array(result)


@given(models(WHOLE, at_least=2), st.integers(1, 6), st.sampled_from([1.0, 0.5, 2.0]))
def test_ties_is_the_published_algorithm(drawn, keep, scale):
    """The first array is the base. The numbers are multiples of 1/16, so opposed vectors often cancel exactly."""
    (base, *arrays), (_, *weights) = drawn
    keep = min(keep, len(base))
    thresholds = [float(sorted(np.abs(array - base), reverse=True)[keep - 1]) for array in arrays]

    assert close(
        methods.ties(*blocks_of([base]), blocks_of(arrays), weights, thresholds, scale),
        ties_as_published(base, arrays, weights, keep, scale),
        largest([base, *arrays]),
    )


@given(models(st.floats(0.015625, 1e3, width=32)))
def test_ties_that_trims_nothing_is_the_mean_where_all_signs_agree(drawn):
    """With density 1, scale 1 and a base below all inputs: bit for bit."""
    arrays, weights = drawn
    base = torch.zeros(len(arrays[0]), dtype=torch.float64)
    merged = methods.ties(base, blocks_of(arrays), weights, [0.0] * len(arrays), 1.0)
    mean = methods.weighted_mean(blocks_of(arrays), weights)

    assert np.array_equal(rounded(merged), rounded(mean))


def test_two_equal_and_opposite_task_vectors_leave_the_weight_of_the_base():
    """No sign is elected where their sum is 0. The same two with other weights elect that of the larger."""
    base, one, other = (torch.tensor([value], dtype=torch.float64) for value in (1.0, 3.0, -1.0))

    assert methods.ties(base, [one, other], [1, 1], [0, 0], 1.0).item() == 1.0
    assert methods.ties(base, [one, other], [1, 2], [0, 0], 1.0).item() == -1.0
    assert methods.ties(base, [one, other], [2, 1], [0, 0], 1.0).item() == 3.0


def slerp(one, other, t):
    """The interpolation of two arrays with the factors under test."""
    factors = methods.slerp_factors(float(one @ other), (float(one @ one), float(other @ other)), t)
    return None if factors is None else factors[0] * one + factors[1] * other


@given(models(at_least=2), st.floats(0, 1))
def test_slerp_is_a_rotation_by_the_share_of_the_angle(drawn, t):
    """Of unit vectors: the result has length 1 and the angle t * omega to the first, computed by atan2."""
    (one, other, *_), _ = drawn
    if min(np.linalg.norm(one), np.linalg.norm(other)) < 1e-3:
        return
    one, other = one / np.linalg.norm(one), other / np.linalg.norm(other)
    omega = 2 * math.atan2(np.linalg.norm(one - other), np.linalg.norm(one + other))
    if omega > 3.1:
        return
    found = slerp(one, other, t)

    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-8)
    assert 2 * math.atan2(np.linalg.norm(found - one), np.linalg.norm(found + one)) == pytest.approx(
        t * omega, abs=1e-6
    )


@given(models(at_least=2))
def test_slerp_ends_at_its_inputs(drawn):
    """t = 0 and t = 1 give them bit for bit, whatever their directions."""
    (one, other, *_), _ = drawn

    assert np.array_equal(slerp(one, other, 0.0), one)
    assert np.array_equal(slerp(one, other, 1.0), other)


def test_slerp_of_a_quarter_turn():
    """cos and sin of 30 degrees, a third of the way; lengths are those of the inputs' combination, not normalized."""
    assert slerp(np.array([2.0, 0.0]), np.array([0.0, 4.0]), 1 / 3) == pytest.approx(
        [2 * math.cos(math.pi / 6), 4 * math.sin(math.pi / 6)]
    )


@pytest.mark.parametrize(
    ("one", "other"), [([1, 2], [2, 4]), ([0, 0], [1, 2]), ([3, 4], [0, 0]), ([0, 0], [0, 0]), ([1, 2], [1, 2 + 1e-9])]
)
def test_slerp_of_parallel_and_zero_tensors_is_linear(one, other):
    """Parallel: the limit of the formula. A zero tensor has no direction."""
    one, other = np.array(one, dtype=float), np.array(other, dtype=float)

    assert slerp(one, other, 0.25) == pytest.approx(0.75 * one + 0.25 * other, rel=1e-12)


def test_slerp_of_opposite_tensors_is_not_defined():
    """Any half circle joins them; a nearly opposite one has a shortest arc."""
    assert slerp(np.array([1.0, 2.0]), np.array([-3.0, -6.0]), 0.5) is None
    assert slerp(np.array([1.0, 2.0]), np.array([-3.0, -6.1]), 0.5) is not None


@given(models(elements=st.floats(width=32, allow_nan=False, allow_infinity=False)), st.integers(1, 5))
def test_a_merge_of_equal_models_is_that_model_to_the_last_bit(drawn, count):
    """Every method, with the model also as the base; the whole range of float32."""
    (one, *_), weights = drawn
    weights = (weights * count)[:count]
    blocks = blocks_of([one] * count)
    merged = [
        methods.weighted_mean(blocks, weights),
        methods.ties(blocks[0], blocks, weights, [0.0] * count, 1.0),
        methods.ties(blocks[0], blocks, weights, [0.0] * count, 0.3),
        methods.task_arithmetic(blocks[0], blocks, weights, 1.0),
        methods.task_arithmetic(blocks[0], blocks, weights, 0.3),
    ]

    assert all(np.array_equal(rounded(result), rounded(one)) for result in merged)


@given(models(elements=st.floats(width=32, allow_nan=False, allow_infinity=False), at_least=2))
def test_a_weight_of_one_among_zeros_gives_that_model(drawn):
    """Linear (1, 0, ...); task arithmetic and TIES with one input and scale 1 give the input, whatever the base is."""
    (one, other, *_), _ = drawn
    base, block = blocks_of([other, one])

    assert np.array_equal(methods.weighted_mean([block, base], [1, 0]), one)
    assert np.array_equal(rounded(methods.task_arithmetic(base, [block], [1], 1.0)), rounded(one))
    assert np.array_equal(rounded(methods.ties(base, [block], [1], [0.0], 1.0)), rounded(one))
