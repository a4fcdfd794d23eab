"""Least-squares fit of an equation to losses, with confidence intervals. Pure functions over numpy arrays.

Every equation here is linear in some coefficients once its shape parameters (exponents, rates) are known:
prediction = terms(shape, x) @ coefficients. The starting points use that; the refinement varies all parameters at once.

Intervals are those of nonlinear least squares: covariance = s^2 (J^T J)^-1 with s^2 = residual sum of squares / (points
- free parameters), times the quantile of Student's t. They assume independent errors of one size and say nothing about
an equation that is wrong; the residuals do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from titan_cpt.errors import DataError

Array = NDArray[np.float64]

_REFINED = 3  # starting points, the best of all, that are refined
_RANK = 1e-9  # singular values of the scaled Jacobian below this share of the largest leave a direction undetermined
_AT_BOUND = 1e-9
_NO_EFFECT = 1e-12  # nats that a change of a parameter by its own size makes in all points together


@dataclass(frozen=True)
class Equation:
    """An equation with parameters: prediction = terms(shape, x) @ coefficients.

    Attributes:
        text: the equation as it is printed.
        source: where it comes from.
        coefficients: names of the coefficients, with the lowest value that each may have.
        shape: names of the shape parameters, with (lowest, highest) value. A lowest value above 0: positive.
        terms: from shape parameters and x (points, variables) to a matrix (points, coefficients).
        starts: values of the shape parameters to start from.
    """

    text: str
    source: str
    coefficients: tuple[tuple[str, float], ...]
    shape: tuple[tuple[str, float, float], ...]
    terms: Callable[[Array, Array], Array]
    starts: Sequence[Sequence[float]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all parameters: coefficients first."""
        return (*(name for name, _ in self.coefficients), *(name for name, _, _ in self.shape))

    def predict(self, values: Array, x: Array) -> Array:
        """The losses at x (points, variables) with these values of the parameters."""
        count = len(self.coefficients)
        result: Array = self.terms(values[count:], x) @ values[:count]
        return result


@dataclass(frozen=True)
class Fit:
    """An equation fitted to points.

    Attributes:
        values: of the parameters, in the order of `Equation.names`.
        covariance: of the parameters; zero for those at a bound, which count as known.
        undetermined: whether the points leave each parameter open: another value fits them as well.
        residuals: measured - fitted, of each point.
        degrees: points - free parameters.
    """

    equation: Equation
    values: Array
    covariance: Array
    undetermined: tuple[bool, ...]
    residuals: Array
    degrees: int

    def predict(self, x: Array) -> Array:
        """The fitted losses at x (points, variables)."""
        return self.equation.predict(self.values, x)

    def half_width(self, x: Array, confidence: float) -> Array:
        """Half the width of the confidence interval of the fitted losses at x."""
        slopes = _jacobian(self.equation, self.values, x)
        variance = np.einsum("ni,ij,nj->n", slopes, self.covariance, slopes)
        half: Array = _quantile(self.degrees, confidence) * np.sqrt(np.maximum(variance, 0.0))
        return half

    def intervals(self, confidence: float) -> list[tuple[str, float, float | None]]:
        """(name, value, half the width of its confidence interval) of each parameter; None: undetermined."""
        half = _quantile(self.degrees, confidence) * np.sqrt(np.maximum(np.diag(self.covariance), 0.0))
        return [
            (name, float(value), None if open_ else float(width))
            for name, value, width, open_ in zip(self.equation.names, self.values, half, self.undetermined, strict=True)
        ]

    @property
    def rms(self) -> float:
        """Root of the mean squared residual."""
        return float(np.sqrt(np.mean(self.residuals**2)))


def fit_equation(equation: Equation, x: Array, y: Array) -> Fit:
    """Fit the equation to the losses y at x (points, variables) by least squares.

    Raises:
        DataError: there are not more points than parameters, or no starting point leads to a finite fit.
    """
    if len(y) <= len(equation.names):
        raise DataError(
            f"{len(y)} points are too few for the {len(equation.names)} parameters of {equation.text}: at least "
            f"{len(equation.names) + 1} are needed; train more runs"
        )
    best = min(
        (_refined(equation, start, x, y) for start in _starts(equation, x, y)),
        key=lambda values: float(np.sum((equation.predict(values, x) - y) ** 2)),
        default=None,
    )
    if best is None:
        raise DataError(f"{equation.text} could not be fitted: no starting point gives finite losses")
    residuals = y - equation.predict(best, x)
    covariance, undetermined, free = _covariance(equation, best, x, float(residuals @ residuals))
    return Fit(equation, best, covariance, undetermined, residuals, len(y) - free)


def _starts(equation: Equation, x: Array, y: Array) -> list[Array]:
    """The best starting points: for each start of the shape parameters, the coefficients that fit best."""
    from scipy.optimize import lsq_linear

    lowest = np.array([low for _, low in equation.coefficients])
    found = []
    for shape in equation.starts:
        terms = equation.terms(np.array(shape, dtype=np.float64), x)
        if not np.all(np.isfinite(terms)):
            continue
        size = np.maximum(np.abs(terms).max(axis=0), 1e-300)
        solved = lsq_linear(terms / size, y, bounds=(lowest * size, np.inf), method="bvls", max_iter=200)
        found.append((float(solved.cost), np.concatenate([solved.x / size, np.array(shape, dtype=np.float64)])))
    found.sort(key=lambda item: item[0])
    return [values for _, values in found[:_REFINED]]


def _refined(equation: Equation, start: Array, x: Array, y: Array) -> Array:
    """The parameters of the nearest minimum; positive shape parameters are varied on a logarithmic scale."""
    from scipy.optimize import least_squares

    low, high, is_log = _bounds(equation)

    def natural(values: Array) -> Array:
        return np.where(is_log, np.exp(np.where(is_log, values, 0.0)), values)

    def residuals(values: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.nan_to_num(equation.predict(natural(values), x) - y, nan=1e6, posinf=1e6, neginf=-1e6)

    inside = np.where(is_log, np.log(np.where(is_log, start, 1.0)), start)
    solved = least_squares(
        residuals, np.clip(inside, low, high), bounds=(low, high), x_scale="jac", max_nfev=200, ftol=1e-14, xtol=1e-12
    )
    return natural(solved.x)


def _bounds(equation: Equation) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Lowest and highest values as they are varied, and which parameters are varied on a logarithmic scale."""
    limits = [(low, np.inf) for _, low in equation.coefficients] + [(low, high) for _, low, high in equation.shape]
    is_log = np.array([index >= len(equation.coefficients) and low > 0 for index, (low, _) in enumerate(limits)])
    low, high = np.array([each[0] for each in limits]), np.array([each[1] for each in limits])
    return (
        np.where(is_log, np.log(np.where(is_log, low, 1)), low),
        np.where(is_log, np.log(np.where(is_log, high, 1)), high),
        is_log,
    )


def _jacobian(equation: Equation, values: Array, x: Array) -> Array:
    """Derivatives of the prediction (points, parameters), by central differences."""
    columns = []
    for index, value in enumerate(values):
        step = 1e-6 * max(abs(value), 1e-3)
        up, down = values.copy(), values.copy()
        up[index] += step
        down[index] -= step
        columns.append((equation.predict(up, x) - equation.predict(down, x)) / (2 * step))
    return np.stack(columns, axis=1)


def _covariance(equation: Equation, values: Array, x: Array, squares: float) -> tuple[Array, tuple[bool, ...], int]:
    """The covariance of the parameters, which of them are undetermined, and how many are free (not at a bound).

    A parameter without effect on any point, such as the exponent of a term whose coefficient is zero, is undetermined.
    """
    jacobian = _jacobian(equation, values, x)
    sizes = np.linalg.norm(jacobian, axis=0)
    bounded = _at_bound(equation, values, sizes)
    has_effect = sizes * np.maximum(np.abs(values), 1.0) > _NO_EFFECT
    free = ~bounded & has_effect
    covariance = np.zeros((len(values), len(values)))
    undetermined = ~bounded & ~has_effect
    if not free.any():
        return covariance, tuple(bool(each) for each in undetermined), 0
    scale = sizes[free]
    _, singular, directions = np.linalg.svd(jacobian[:, free] / scale, full_matrices=False)
    known = singular > _RANK * singular.max()
    root = directions.T * np.where(known, 1 / np.where(known, singular, 1.0), 0.0)
    degrees = max(1, len(x) - int(free.sum()))
    covariance[np.ix_(free, free)] = root @ root.T * (squares / degrees) / np.outer(scale, scale)
    undetermined[free] = (np.abs(directions[~known]) > 1e-3).any(axis=0)
    return covariance, tuple(bool(each) for each in undetermined), int(free.sum())


def _at_bound(equation: Equation, values: Array, sizes: Array) -> NDArray[np.bool_]:
    """Parameters at a bound: coefficients whose term is too small to matter, shape parameters at either end."""
    low, high, is_log = _bounds(equation)
    varied = np.where(is_log, np.log(np.where(is_log, values, 1.0)), values)
    near = (varied <= low + _AT_BOUND) | (varied >= high - _AT_BOUND)
    count = len(equation.coefficients)
    near[:count] = np.isfinite(low[:count]) & ((values - low)[:count] * sizes[:count] < _AT_BOUND)
    return near


def _quantile(degrees: int, confidence: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, max(1, degrees)))
