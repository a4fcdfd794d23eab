"""Orthogonalization: singular values near 1, any power of two as a scale, the sum of squares that overflows."""

import math

import pytest
import torch
from torch import nn

from titan_cpt.training.optimization.newton_schulz import lr_factor, orthogonalize

SHAPES = [(16, 16), (12, 40), (40, 12), (1, 9), (9, 1), (7, 5)]


def matrix_of(shape, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * scale).bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_move_near_1_and_singular_vectors_stay(shape):
    """The coefficients leave them between 0.5 and 1.5, here with bfloat16's rounding."""
    matrix = matrix_of(shape)
    left, _, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    found = left.T @ orthogonalize(matrix.clone(), 5).float() @ right.T

    assert found.shape == (min(shape), min(shape))
    assert found.diagonal().min() > 0.5
    assert found.diagonal().max() < 1.5
    assert (found - found.diagonal().diag()).abs().max() < 0.1


@pytest.mark.parametrize("exponent", [-10, 1, 60, 66, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_power_of_two_as_a_factor_changes_no_bit(shape, exponent):
    """From 2^64 on the sum of squares is infinite in float32, where dividing by the norm would leave 0."""
    matrix = matrix_of(shape)
    scaled = matrix * 2.0**exponent
    result = orthogonalize(matrix, 5)

    assert scaled.isfinite().all()
    assert torch.equal(orthogonalize(scaled, 5), result)


@pytest.mark.parametrize("shape", [(1152, 384), (1536, 384), (384, 1536), (500, 77)], ids=str)
def test_the_bits_of_larger_matrices_are_those_of_torch(shape):
    """The order of sums in a product depends on the strides of a transposed matrix."""
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = matrix_of(shape).float()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="original").step()
    ours = orthogonalize(matrix_of(shape), 5).float() * lr_factor(*shape, "original")

    assert torch.equal(-weight, ours)


def test_a_matrix_of_zeros_stays_zero():
    """Its norm is below the smallest divisor."""
    assert torch.equal(orthogonalize(torch.zeros(3, 4, dtype=torch.bfloat16), 5), torch.zeros(3, 4).bfloat16())


@pytest.mark.parametrize(
    ("rows", "columns", "match", "original"), [(100, 25, 2.0, 2.0), (25, 100, 2.0, 1.0), (4, 4, 0.4, 1.0)]
)
def test_the_factors_of_the_learning_rate_by_hand(rows, columns, match, original):
    """0.2 x the square root of the longer side; the square root of rows over columns, at least 1."""
    assert math.isclose(lr_factor(rows, columns, "match_rms_adamw"), match)
    assert math.isclose(lr_factor(rows, columns, "original"), original)


def test_an_update_has_about_the_root_mean_square_of_adamws():
    """0.2 per unit of the learning rate, for matrices of any shape: the largest side only scales it back."""
    for shape in ((64, 64), (64, 256), (256, 64)):
        update = orthogonalize(matrix_of(shape), 5).float() * lr_factor(*shape, "match_rms_adamw")
        assert 0.14 < update.square().mean().sqrt() < 0.22
