"""The equations, by hand."""

import numpy as np
import pytest

from titan_cpt.runs.laws import equations


def test_the_annealing_area_of_a_step_down():
    """LRs 4, 4, 2, 2 and decay 0.5: m is 0, 0, 2, 1, and its sums are 0, 0, 2, 3. A warm-up has a negative area."""
    assert equations.annealing_areas(np.array([4.0, 4.0, 2.0, 2.0]), 0.5).tolist() == [0, 0, 2, 3]
    assert equations.annealing_areas(np.array([1.0, 3.0]), 0.5).tolist() == [0, -2]


@pytest.mark.parametrize(
    ("equation", "values", "x", "expected"),
    [
        (equations.power_of_share(), [2, 3, 2], [0.5], 2 + 3 / 4),
        (equations.critical_share(), [0.1, 0.2, 0.5], [0.25], 0.1 + 0.2 / 2),
        # E, B, C, A; eta, beta, epsilon, gamma, alpha at N = 0.25, D = 0.5, r = 0.25
        (
            equations.d_cpt(several_sizes=True),
            [1, 2, 3, 4, 0.5, 1, 0.25, 1, 0.5],
            [0.25, 0.5, 0.25],
            1 + 4 / 0.5 + 2 * 0.5 / 0.5 + 3 / 0.5,
        ),
        (equations.log_linear("ab"), [1, 2, 3], [0.5], 1 + 2 * np.exp(1.5)),
        # L0, A, C, B; alpha, E, beta at S1_before = 3, S1 = 1, S2 = 0.5
        (equations.lr_curve(), [1, 2, 3, 4, 0.5, 3, 0.5], [3, 1, 0.5], 1 + 2 / 2 - 1.5 + 4 * (1 - 1 / 2)),
    ],
)
def test_an_equation_gives_the_loss_of_its_text(equation, values, x, expected):
    """Values that can be computed by hand."""
    assert equation.predict(np.array(values, dtype=float), np.array([x], dtype=float)) == pytest.approx([expected])


def test_many_datasets_have_few_starting_points():
    """Four values for each of ten datasets would be a million."""
    assert len(equations.log_linear([f"d{number}" for number in range(11)]).starts) == 40
