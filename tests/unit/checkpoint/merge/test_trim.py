"""The threshold of a share of the largest magnitudes, against sorting."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.checkpoint.merge.trim import kept_count, magnitude_thresholds

MAGNITUDES = st.floats(0, width=32, allow_infinity=False)


@given(st.data(), st.integers(1, 40), st.integers(1, 3), st.integers(1, 7))
def test_a_threshold_is_the_keep_th_largest_magnitude(data, size, vectors, block):
    """Of each vector by itself, whatever the blocks; the whole range of float32, with repeated values and zeros."""
    few = data.draw(st.lists(MAGNITUDES, min_size=1, max_size=4))
    values = st.one_of(MAGNITUDES, st.sampled_from(few), st.just(0.0))
    arrays = [
        np.array(data.draw(st.lists(values, min_size=size, max_size=size)), dtype=np.float32) for _ in range(vectors)
    ]
    keep = data.draw(st.integers(1, size))

    def a_pass():
        for first in range(0, size, block):
            yield [torch.from_numpy(array[first : first + block]) for array in arrays]

    assert magnitude_thresholds(a_pass, keep) == [float(np.sort(array)[size - keep]) for array in arrays]


@pytest.mark.parametrize(
    ("density", "size", "kept"), [(0.2, 10, 2), (0.2, 11, 3), (0.1, 30, 3), (1e-9, 5, 1), (1, 7, 7), (0.7, 10, 7)]
)
def test_a_density_keeps_that_share_rounded_up(density, size, kept):
    """Computed with the decimal number as it is written: 0.1 of 30 are 3, not 4."""
    assert kept_count(density, size) == kept
