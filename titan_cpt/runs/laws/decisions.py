"""The value that fitted laws advise: the lowest objective whose losses stay below their limits, among trained values.

Nothing here leaves the trained range: where no value inside it keeps the limits, there is no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from titan_cpt.runs.laws.fitting import Array

_SLACK = 1e-6  # nats, and shares: what a constraint may be missed by
_GRID = 4001  # values that are compared; two neighbours differ by 1/4000 of the trained range


@dataclass(frozen=True)
class PredictedLoss:
    """A predicted loss as a function of one value, with half the width of its confidence interval."""

    loss: Callable[[Array], Array]
    half_width: Callable[[Array], Array]


@dataclass(frozen=True)
class Choice:
    """The advised value of one quantity.

    Attributes:
        value: None if no trained value keeps all limits.
        low, high: the values advised if all limited losses are at the upper or the lower end of their interval; None
            where no trained value keeps the limits then.
        at_edge: the value is the lowest or highest trained one, so that a better one may be outside.
        losses: predicted losses at the value.
    """

    value: float | None
    low: float | None
    high: float | None
    at_edge: bool
    losses: Mapping[str, float]


def choose(
    objective: Mapping[str, float],
    curves: Mapping[str, PredictedLoss],
    limits: Mapping[str, float],
    trained: Sequence[float],
) -> Choice:
    """The value in the trained range with the lowest weighted objective among those that keep all limits.

    Args:
        objective: datasets whose loss is to be low, with weights.
        curves: of every dataset of the objective and of the limits.
        limits: the highest allowed loss of each dataset.
        trained: the values that were trained; those between the lowest and the highest are compared.
    """
    grid = np.linspace(min(trained), max(trained), _GRID)
    goal = sum((weight * curves[name].loss(grid) for name, weight in objective.items()), np.zeros(_GRID))
    losses = {name: curves[name].loss(grid) for name in {*objective, *limits}}
    half = {name: curves[name].half_width(grid) for name in limits}

    def best(sign: float) -> int | None:
        kept = np.ones(_GRID, dtype=bool)
        for name, limit in limits.items():
            kept &= losses[name] + sign * half[name] <= limit + 1e-12
        return int(np.argmin(np.where(kept, goal, np.inf))) if kept.any() else None

    middle, careful, bold = best(0.0), best(1.0), best(-1.0)
    ends = [None if index is None else float(grid[index]) for index in (careful, bold)]
    known = sorted(end for end in ends if end is not None)
    return Choice(
        value=None if middle is None else float(grid[middle]),
        low=known[0] if len(known) == 2 else None,
        high=known[1] if len(known) == 2 else None,
        at_edge=middle in (0, _GRID - 1),
        losses={} if middle is None else {name: float(values[middle]) for name, values in sorted(losses.items())},
    )


def best_mixture(
    objective: Callable[[Array], float],
    limits: Sequence[Callable[[Array], float]],
    trained: Array,
    highest: Array | None = None,
) -> Array | None:
    """The mixture with the lowest objective, as a convex combination of trained mixtures: nothing is extrapolated.

    The log-linear laws are convex in the mixture, so a local minimum is the global one.

    Args:
        objective: the weighted loss of a mixture.
        limits: functions of a mixture that must be at least 0.
        trained: (runs, datasets); each row adds up to 1.
        highest: the highest share of each dataset; None for no bound.

    Returns:
        The shares; None if no combination keeps the limits.
    """
    count = len(trained)
    rules = [{"type": "eq", "fun": lambda weights: float(weights.sum() - 1)}]
    for limit in limits:
        rules.append({"type": "ineq", "fun": lambda weights, limit=limit: limit(weights @ trained)})
    if highest is not None:
        rules.append({"type": "ineq", "fun": lambda weights: highest - weights @ trained})
    found = []
    for start in (np.full(count, 1 / count), *np.eye(count)):
        mixture = _minimum(objective, rules, start, trained)
        kept = all(limit(mixture) >= -_SLACK for limit in limits)
        if kept and (highest is None or bool(np.all(mixture <= highest + _SLACK))):
            found.append((float(objective(mixture)), mixture))
    return min(found, key=lambda item: item[0])[1] if found else None


def _minimum(
    objective: Callable[[Array], float], rules: Sequence[Mapping[str, Any]], start: Array, trained: Array
) -> Array:
    """The mixture that sequential quadratic programming finds from these weights of the trained mixtures."""
    from scipy.optimize import minimize

    solved = minimize(
        lambda weights: objective(weights @ trained),
        start,
        bounds=[(0.0, 1.0)] * len(trained),
        constraints=list(rules),
        method="SLSQP",
        options={"maxiter": 300, "ftol": 1e-12},
    )
    weights: Array = np.clip(solved.x, 0, 1)
    mixture: Array = weights @ trained / weights.sum()
    return mixture
