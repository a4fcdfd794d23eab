"""Claims about the curve over tokens and the rules that decide them. Written and committed before any of its runs.

A run is named SWEEP/RUN@STEPS, STEPS being those of one stage; the lengths are 2, 6, 20 and 60 tokens a parameter. AVG
is the mean of the final losses on the old and the new data. The gap is AVG minus that of joint training (`union`) with
the tokens of both stages. All differences are paired by seed and compared with Student's t times their standard error
(averages_claims.py); with one seed, as at 60 tokens a parameter, only the sign decides (verdicts.py).

The law gap = a N^-b, N in tokens a parameter, is fitted to the mean gaps by weighted least squares. It counts as
*holding* if no residual is beyond Student's t times its standard error, and as *predicting* the last length if the law
of the others is off by at most a quarter of the measured gap.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from averages_claims import errors_that_count
from verdicts import Claim, End, Part, Runs

LENGTHS = {320: 2, 970: 6, 3_230: 20, 9_700: 60}
"""Steps of one stage: tokens a parameter, rounded. The tables show the exact number of each plan."""
SHIFTS = {"strong": "german", "weak": "other"}
NONE, FIVE, QUARTER, HALF = (f"replay/fraction-{share}" for share in ("0", "0.05", "0.25", "0.5"))
UNION, LOW, INFINITE = "union/union", "low/low", "infinite/infinite"
LARGEST_MISS = 0.25


def name_of(shift: str, arm: str, steps: int) -> str:
    """The name of a result: strong_union/strong_union@320."""
    sweep, _, run = arm.partition("/")
    return f"{shift}_{sweep}/{run if run.startswith('fraction') else f'{shift}_{run}'}@{steps}"


def curve_claims() -> list[Claim]:
    """G1 to G8."""
    lengths = list(LENGTHS)
    shorter = lengths[:-1]  # the last has one seed
    return [
        Claim(
            "G1",
            "the gap to joint training closes with more tokens",
            [_closing(shift, shorter[0], shorter[-1]) for shift in SHIFTS],
        ),
        *_reaching("G2", "strong", QUARTER, "25 % replay"),
        *_reaching("G3", "weak", QUARTER, "25 % replay"),
        *_reaching("G4", "strong", INFINITE, "an infinite schedule with 25 % replay"),
        Claim(
            "G5",
            "re-warming and re-decaying is better than the lowest LR at every length",
            [_difference("strong", LOW, QUARTER, steps, "low LR minus re-warmed") for steps in shorter],
        ),
        Claim(
            "G6",
            "more replay forgets less at every length",
            [
                _less_forgetting(steps, *pair)
                for steps in shorter
                for pair in ((NONE, FIVE), (FIVE, QUARTER), (QUARTER, HALF))
            ],
        ),
        Claim(
            "G7",
            "5 % replay costs the new data almost nothing at every length",
            [_cost(shift, steps) for shift in SHIFTS for steps in shorter],
        ),
        Claim(
            "G8",
            "the stronger shift forgets more and needs more replay at every length",
            [_stronger(steps, arm, percent) for steps in shorter for arm, percent in ((NONE, "no"), (FIVE, "5 %"))],
        ),
    ]


def _gap(shift: str, arm: str, steps: int) -> tuple[list[str], Callable[[Mapping[str, End]], float]]:
    run, union = name_of(shift, arm, steps), name_of(shift, UNION, steps)
    return [run, union], lambda e: e[run].average - e[union].average


def _closing(shift: str, first: int, last: int) -> Part:
    early, of_early = _gap(shift, QUARTER, first)
    late, of_late = _gap(shift, QUARTER, last)
    return Part(
        f"{shift} shift, gap of 25 % replay at {LENGTHS[first]} minus at {LENGTHS[last]} tokens a parameter",
        [*early, *late],
        lambda e: of_early(e) - of_late(e),
        errors=errors_that_count,
    )


def _reaching(number: str, shift: str, arm: str, words: str) -> list[Claim]:
    claims = []
    for steps, tokens in LENGTHS.items():
        runs, gap = _gap(shift, arm, steps)
        union = runs[1]
        part = Part(
            f"AVG minus joint training's at {tokens}",
            runs,
            gap,
            "within",
            lambda e, union=union: e[union].average,  # type: ignore[misc]
            errors=errors_that_count,
        )
        statement = f"{shift} shift: {words} reaches joint training at {tokens} tokens a parameter"
        claims.append(Claim(f"{number}@{tokens}", statement, [part]))
    return claims


def _difference(shift: str, worse: str, better: str, steps: int, words: str) -> Part:
    one, other = name_of(shift, worse, steps), name_of(shift, better, steps)
    return Part(
        f"AVG, {words} at {LENGTHS[steps]}",
        [one, other],
        lambda e: e[one].average - e[other].average,
        errors=errors_that_count,
    )


def _less_forgetting(steps: int, less: str, more: str) -> Part:
    one, other = name_of("strong", less, steps), name_of("strong", more, steps)
    shares = " minus ".join(f"{100 * float(arm.rpartition('-')[2]):g} %" for arm in (less, more))
    return Part(
        f"forgetting, {shares} at {LENGTHS[steps]}",
        [one, other],
        lambda e: e[one].forgetting - e[other].forgetting,
        errors=errors_that_count,
    )


def _cost(shift: str, steps: int) -> Part:
    none, five = name_of(shift, NONE, steps), name_of(shift, FIVE, steps)
    new = SHIFTS[shift]
    return Part(
        f"{new}, 5 % minus none at {LENGTHS[steps]}",
        [none, five],
        lambda e: e[five].losses[new] - e[none].losses[new],
        "within",
        lambda e: e[none].losses[new],
        errors=errors_that_count,
    )


def _stronger(steps: int, arm: str, percent: str) -> Part:
    strong, weak = name_of("strong", arm, steps), name_of("weak", arm, steps)
    return Part(
        f"forgetting with {percent} replay, strong minus weak at {LENGTHS[steps]}",
        [strong, weak],
        lambda e: e[strong].forgetting - e[weak].forgetting,
        errors=errors_that_count,
    )


@dataclass(frozen=True)
class Point:
    """A mean over seeds at one length.

    Attributes:
        tokens: a parameter, in one stage.
        error: standard error; None with one seed.
    """

    tokens: float
    value: float
    error: float | None
    seeds: int


def gap_points(runs: Runs, shift: str, arm: str, tokens: Mapping[int, float] = LENGTHS) -> list[Point]:
    """The gap to joint training at every length for which both have a result, paired by seed.

    Args:
        tokens: exact tokens a parameter, by steps.
    """
    points = []
    for steps in LENGTHS:
        names, gap = _gap(shift, arm, steps)
        seeds = sorted({seed for name, seed in runs if name == names[0] and (names[1], seed) in runs})
        values = [gap({name: runs[name, seed] for name in names}) for seed in seeds]
        if values:
            points.append(point(tokens.get(steps, LENGTHS[steps]), values))
    return points


def point(tokens: float, values: Sequence[float]) -> Point:
    """Mean and standard error."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Point(tokens, mean(values), error, len(values))


@dataclass(frozen=True)
class Law:
    """gap = scale * tokens ** -exponent, and what is left of each point.

    Attributes:
        scale_error: standard error of the fit; None if two points determine it exactly. exponent_error likewise.
        residuals: measured minus fitted, nats per token.
    """

    scale: float
    exponent: float
    scale_error: float | None
    exponent_error: float | None
    residuals: list[float]

    def at(self, tokens: float) -> float:
        """The gap that the law has at this many tokens a parameter."""
        return self.scale * tokens**-self.exponent

    def holds(self, points: Sequence[Point]) -> bool | None:
        """Whether every residual is within Student's t times its standard error; None with too few points or seeds."""
        known = [(each, left) for each, left in zip(points, self.residuals, strict=True) if each.error is not None]
        if len(points) < 3 or not known:
            return None
        return all(abs(left) <= errors_that_count(each.seeds) * (each.error or 0.0) for each, left in known)


def fit_law(points: Sequence[Point]) -> Law | None:
    """The law by weighted least squares; None for fewer than two points, or if it does not converge.

    A point with one seed has the largest standard error of the others; without any, all weigh the same.
    """
    from scipy.optimize import OptimizeWarning, curve_fit  # takes half a second

    if len(points) < 2:
        return None
    known = [each.error for each in points if each.error]
    errors = [each.error or max(known) for each in points] if known else [1.0] * len(points)
    tokens = [each.tokens for each in points]
    values = [each.value for each in points]
    start = (max(values[0], 1e-3) * tokens[0] ** 0.5, 0.5)
    exact = len(points) == 2
    with warnings.catch_warnings():
        if exact:  # nothing is left to estimate an error from
            warnings.simplefilter("ignore", OptimizeWarning)
        try:
            best, covariance = curve_fit(_power, tokens, values, p0=start, sigma=errors, absolute_sigma=bool(known))
        except RuntimeError:
            return None
    scale, exponent = (float(each) for each in best)
    spread = [None if exact else float(math.sqrt(covariance[i][i])) for i in (0, 1)]
    left = [value - float(_power(number, scale, exponent)) for number, value in zip(tokens, values, strict=True)]
    return Law(scale, exponent, spread[0], spread[1], left)


def _power(tokens, scale, exponent):  # numbers or arrays
    return scale * tokens**-exponent


def prediction_of_last(points: Sequence[Point]) -> tuple[float, bool] | None:
    """What the law of all points but the last has for the last, and whether it is off by at most LARGEST_MISS of it."""
    law = fit_law(points[:-1]) if len(points) >= 3 else None
    if law is None:
        return None
    predicted = law.at(points[-1].tokens)
    return predicted, abs(predicted - points[-1].value) <= LARGEST_MISS * abs(points[-1].value)
