"""The fit: it finds the parameters of an equation that made the losses, and its intervals cover them as they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_cpt.errors import DataError
from titan_cpt.runs.laws import equations
from titan_cpt.runs.laws.fitting import fit_equation

SHARES = np.array([0.1, 0.25, 0.5, 0.75, 0.9, 1.0])[:, None]


def schedule_areas():
    """x of lr_curve: two cosines and a constant LR of 200 steps, each at ten steps, after as much area before."""
    rows = []
    for peak, ends_at in ((0.5, 0.0), (1.0, 0.1), (0.3, 1.0)):
        lrs = peak * (ends_at + (1 - ends_at) * 0.5 * (1 + np.cos(np.linspace(0, np.pi, 200))))
        area, annealed = np.cumsum(lrs) / 100, equations.annealing_areas(lrs, 0.99) / 100
        rows += [(2.0, area[step], annealed[step]) for step in range(19, 200, 20)]
    return np.array(rows)


def sizes_tokens_shares(sizes):
    return np.array([(n, d, r) for n in sizes for d in np.linspace(0.1, 1, 6) for r in (0.0, 0.1, 0.4, 0.8)])


def mixtures():
    return np.random.default_rng(0).dirichlet([1, 1, 1], size=9)[:, :2]


MADE = {  # an equation, its parameters in the order of `names`, and x
    "cmr, rising": (equations.power_of_share(), (2.9, 0.4, 1.7), SHARES),
    "cmr, falling": (equations.power_of_share(), (2.0, 0.1, -0.6), SHARES),
    "cmr over tokens": (equations.critical_share(), (0.1, 0.2, 0.4), np.linspace(0.1, 1, 8)[:, None]),
    "d_cpt": (equations.d_cpt(several_sizes=False), (2.1, 0.2, 0.05, 0.7, 0.35, 0.1, 0.8), sizes_tokens_shares([1])),
    "d_cpt, sizes": (
        equations.d_cpt(several_sizes=True),
        (1.8, 0.2, 0.05, 0.3, 0.7, 0.35, 0.1, 0.8, 0.3),
        sizes_tokens_shares([0.1, 0.3, 1.0]),
    ),
    "log_linear": (equations.log_linear("abc"), (1.5, 2.2, -1.8, -0.5), mixtures()),
    "lr_curve": (equations.lr_curve(), (2.2, 0.5, 0.3, 0.4, 0.4, 8.0, 0.7), schedule_areas()),
    "lr_curve, new data": (equations.lr_curve(), (1.9, 0.6, 0.2, -0.8, 0.3, 30.0, 0.5), schedule_areas()),
}


@pytest.mark.parametrize("name", MADE)
def test_a_law_refits_its_own_losses(name):
    """Without noise to a hundredth of a percent; with noise of 0.002 nats to twice that, of losses without it."""
    equation, values, x = MADE[name]
    losses = equation.predict(np.array(values), x)
    noise = np.random.default_rng(1).normal(size=len(x)) * 0.002

    assert fit_equation(equation, x, losses).predict(x) == pytest.approx(losses, rel=1e-4)
    assert fit_equation(equation, x, losses + noise).predict(x) == pytest.approx(losses, abs=0.004)


def test_the_parameters_are_found_where_the_points_determine_them():
    """And are called undetermined where they do not: with two sizes, E, A and alpha fit in many ways."""
    equation, values, x = MADE["d_cpt, sizes"]
    found = fit_equation(equation, x, equation.predict(np.array(values), x))
    two = x[x[:, 0] > 0.2]
    of_two = fit_equation(equation, two, equation.predict(np.array(values), two))

    assert found.values == pytest.approx(values, rel=1e-3)
    assert not any(found.undetermined)
    open_ = [name for name, _, half in of_two.intervals(0.95) if half is None]
    assert open_ == ["E", "A", "alpha"]
    assert of_two.predict(two) == pytest.approx(equation.predict(np.array(values), two), rel=1e-4)


def test_the_interval_of_a_fitted_loss_covers_the_true_one_as_often_as_it_says():
    """The 90 % interval at R = 0.6 of 100 noisy data sets covers 90 +- 9 times (3 standard deviations)."""
    equation, values, x = MADE["cmr, rising"]
    true = equation.predict(np.array(values), np.array([[0.6]]))[0]
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(100):
        found = fit_equation(equation, x, equation.predict(np.array(values), x) + rng.normal(size=len(x)) * 0.01)
        covered += abs(found.predict(np.array([[0.6]]))[0] - true) < found.half_width(np.array([[0.6]]), 0.9)[0]

    assert 81 <= covered <= 99


@settings(max_examples=8, deadline=None)
@given(
    st.floats(1.0, 4.0),
    st.floats(0.05, 1.0),
    st.sampled_from([-1.2, -0.5, 0.5, 1.0, 2.0]),
    st.floats(-2.0, 2.0),
)
def test_adding_a_constant_to_all_losses_moves_only_the_constant(beta, alpha, exponent, shift):
    """Share laws and their slopes do not depend on the level of the losses."""
    equation = equations.power_of_share()
    losses = equation.predict(np.array([beta, alpha, exponent]), SHARES)
    first, second = fit_equation(equation, SHARES, losses), fit_equation(equation, SHARES, losses + shift)

    assert second.values[1:] == pytest.approx(first.values[1:], rel=1e-3, abs=1e-4)
    assert second.values[0] == pytest.approx(first.values[0] + shift, rel=1e-3, abs=1e-3)


def test_too_few_points_are_refused():
    """Three parameters need four points: three would be fitted exactly, whatever they are."""
    with pytest.raises(DataError, match=r"3 points are too few for the 3 parameters .*: at least 4 are needed"):
        fit_equation(equations.power_of_share(), SHARES[:3], np.array([1.0, 2.0, 3.0]))


def test_a_term_that_the_losses_do_not_have_leaves_its_exponents_open():
    """Losses without B r^eta / D^beta: B is 0, a bound, eta and beta are undetermined, and no number overflows."""
    equation, _, x = MADE["d_cpt"]
    losses = equation.predict(np.array([2.0, 0.0, 0.2, 1.0, 0.5, 0.2, 0.8]), x)
    found = fit_equation(equation, x, losses + np.random.default_rng(3).normal(size=len(x)) * 0.01)
    of = {name: half for name, _, half in found.intervals(0.95)}

    assert np.isfinite(found.covariance).all()
    assert np.isfinite(found.half_width(x, 0.95)).all()
    assert found.predict(x) == pytest.approx(losses, abs=0.02)
    assert of["E"] is None or of["E"] > 0
    zero = fit_equation(equation, x, losses - 0.05 * x[:, 2] / x[:, 1])  # the term would be negative
    assert [name for name, _, half in zero.intervals(0.95) if half is None][:2] == ["eta", "beta"]
