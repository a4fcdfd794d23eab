"""The laws of [sweep.fit], applied to the measured runs of a sweep: the fits, and the value that they advise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from titan_cpt.config.sweep import SweepFitConfig
from titan_cpt.errors import DataError
from titan_cpt.runs.laws import equations
from titan_cpt.runs.laws.advice import EXTRAPOLATED, LawResult, describe, describe_mixture, describe_share
from titan_cpt.runs.laws.decisions import PredictedLoss, best_mixture, choose
from titan_cpt.runs.laws.fitting import Array, Equation, Fit, fit_equation
from titan_cpt.runs.laws.measured import MeasuredRun

_CRITICAL_POINTS = 5  # equation 8 has three parameters
_MOST_CRITICAL_POINTS = 16
_SMALLEST_RISE = 0.001  # nats; a limit of 0 tolerates this much misfit


def apply_law(settings: SweepFitConfig, runs: Sequence[MeasuredRun]) -> LawResult:
    """Fit the law to the runs of one stage.

    Raises:
        DataError: too few runs, or runs that do not vary what the law is about.
    """
    if not runs:
        raise DataError("no run of this sweep is trained to its end: there is nothing to fit")
    names = {*settings.weights, *settings.limit}
    for run in runs:
        if missing := sorted(names - set(run.end)):
            known = ", ".join(sorted(run.end))
            raise DataError(f"{run.name} has no validation loss of {missing[0]!r}; there are {known}")
    laws: dict[str, Callable[[SweepFitConfig, Sequence[MeasuredRun]], LawResult]] = {
        "cmr": _cmr,
        "d_cpt": _d_cpt,
        "log_linear": _log_linear,
        "lr_curve": _lr_curve,
    }
    result = laws[settings.law](settings, runs)
    for name, rise in settings.limit.items():
        rms = result.fits[name].rms
        if rms > max(rise, _SMALLEST_RISE):
            result.answer["misfit"] = [*result.answer.get("misfit", []), name]
            result.answers.append(
                f"do not rely on this: the law misses the losses of {name} by {rms:.4f} nats (RMS), and its limit "
                f"allows a rise of {rise:g}; another law, or fewer settings in one sweep, may describe them"
            )
    return result


def _cmr(settings: SweepFitConfig, runs: Sequence[MeasuredRun]) -> LawResult:
    """The power law of the loss against the domain's share, at the end of the stage and at earlier token counts."""
    domain = " + ".join(settings.weights)
    result = LawResult("cmr", f"share of {domain}", limits=_limits(settings, runs))
    used = [run for run in runs if _domain_share(settings, run) > 0]
    shares = [_domain_share(settings, run) for run in used]
    _require_values(shares, 4, result.variable, "stages.NAME.replay.fraction")
    _add_points(result, settings, {run.name: [_domain_share(settings, run)] for run in used})
    for name, points in result.points.items():
        result.fits[name] = _fit_points(equations.power_of_share(), points, _losses(used, name))
    result.values = {run.name: f"{share:.4f}" for run, share in zip(used, shares, strict=True)}
    choice = choose(settings.weights, _curves(result, settings, _column), result.limits, shares)
    describe_share(result, settings, choice, shares)
    _critical_shares(result, settings, used)
    return result


def _critical_shares(result: LawResult, settings: SweepFitConfig, runs: Sequence[MeasuredRun]) -> None:
    """Fit equation 8: the critical share at the token counts at which all runs were validated."""
    found = _critical_points(result, settings, runs)
    result.answer["critical_shares"] = [{"tokens": tokens, "share": share} for tokens, share in found]
    largest = float(max(run.stage.tokens for run in runs))
    target = float(settings.tokens or largest)
    if len(found) < _CRITICAL_POINTS:
        if target != largest:
            raise DataError(
                f"sweep.fit.tokens: the critical share is inside the trained shares at {len(found)} token counts, "
                f"and its law over tokens (equation 8) needs {_CRITICAL_POINTS}: validate more often "
                "(validation.interval), or remove tokens"
            )
        return
    x = np.array([[tokens / largest] for tokens, _ in found])
    fitted = fit_equation(equations.critical_share(), x, np.array([share for _, share in found]))
    at = np.array([[target / largest]])
    share, half = float(fitted.predict(at)[0]), float(fitted.half_width(at, settings.confidence)[0])
    outside = target > largest or target < min(tokens for tokens, _ in found)
    parameters = {name: value for name, value, _ in fitted.intervals(settings.confidence)}
    law = {"parameters": parameters, "tokens": target, "share": share, "half_width": half, "extrapolated": outside}
    result.answer["critical_share_law"] = law
    result.answers.append(
        f"over tokens ({fitted.equation.text}, T relative to {largest:,.0f}; {len(found)} points, RMS "
        f"{fitted.rms:.4f}; {', '.join(f'{name} = {value:.4g}' for name, value in parameters.items())}): "
        f"{share:.3f} +- {half:.3f} at {target:,.0f} tokens" + (f" ({EXTRAPOLATED})" if outside else "")
    )


def _critical_points(
    result: LawResult, settings: SweepFitConfig, runs: Sequence[MeasuredRun]
) -> list[tuple[float, float]]:
    """(tokens, critical share), where that is inside the trained shares."""
    names = {*settings.weights, *settings.limit}
    steps = sorted(set.intersection(*({step for step, _ in run.curve} for run in runs)))
    every = max(1, len(steps) // _MOST_CRITICAL_POINTS)
    x = np.array([[_domain_share(settings, run)] for run in runs])
    found = []
    for step in steps[::-1][::every]:
        tokens = {run.stage.tokens_before(step) for run in runs}
        losses = [dict(run.curve)[step] for run in runs]
        if len(tokens) > 1 or not all(names <= set(each) for each in losses):
            continue
        curves = {
            name: _curve(
                fit_equation(equations.power_of_share(), x, np.array([each[name] for each in losses])),
                settings,
                _column,
            )
            for name in names
        }
        choice = choose(settings.weights, curves, result.limits, x[:, 0].tolist())
        if choice.value is not None and not choice.at_edge:
            found.append((float(tokens.pop()), choice.value))
    return found[::-1]


def _d_cpt(settings: SweepFitConfig, runs: Sequence[MeasuredRun]) -> LawResult:
    """The D-CPT law on every validation of every run, and the share of the domain that it advises."""
    domain = " + ".join(settings.weights)
    result = LawResult("d_cpt", f"share of {domain}", limits=_limits(settings, runs))
    shares = [_domain_share(settings, run) for run in runs]
    _require_values(shares, 3, result.variable, "stages.NAME.replay.fraction")
    sizes = [run.plan.spec.parameters for run in runs]
    if len(set(sizes)) == 2:
        raise DataError("the D-CPT law needs one model size, or at least three: these runs have two")
    largest = max(run.stage.tokens for run in runs)
    for name in sorted({*settings.weights, *settings.limit}):
        result.points[name], losses = _size_token_share_points(runs, name)
        if len({x[1] for _, x in result.points[name]}) < 3:
            raise DataError(
                "the D-CPT law needs losses at three token counts or more: validate more often (validation.interval)"
            )
        equation = equations.d_cpt(several_sizes=len(set(sizes)) > 1)
        result.fits[name] = _fit_points(equation, result.points[name], losses)
    result.values = {run.name: f"{share:.4f}" for run, share in zip(runs, shares, strict=True)}
    target = float(settings.tokens or largest)

    def x_of(name: str) -> Callable[[Array], Array]:
        own = _interpolated(shares, [run.share(name) for run in runs], result.variable)
        return lambda values: np.stack(
            [np.ones(len(values)), np.full(len(values), target / largest), own(values)], axis=1
        )

    curves = {name: _curve(fitted, settings, x_of(name)) for name, fitted in result.fits.items()}
    choice = choose(settings.weights, curves, result.limits, shares)
    describe_share(result, settings, choice, shares)
    if target > largest:
        result.answer["extrapolated"] = True
        result.answers.append(f"at {target:,.0f} tokens, {EXTRAPOLATED}: the runs have at most {largest:,}")
    return result


def _size_token_share_points(runs: Sequence[MeasuredRun], name: str) -> tuple[list[tuple[str, Array]], list[float]]:
    """(run, (N, D, r)) of every validation of a dataset, N and D relative to the largest, and the losses."""
    size, tokens = max(run.plan.spec.parameters for run in runs), max(run.stage.tokens for run in runs)
    measured = [(run, step, losses[name]) for run in runs for step, losses in run.curve if name in losses]
    points = [
        (run.name, np.array([run.plan.spec.parameters / size, run.stage.tokens_before(step) / tokens, run.share(name)]))
        for run, step, _ in measured
    ]
    return points, [loss for *_, loss in measured]


def _log_linear(settings: SweepFitConfig, runs: Sequence[MeasuredRun]) -> LawResult:
    """The log-linear law of every loss in the mixture, and the best mixture among combinations of trained ones."""
    datasets = sorted({name for run in runs for name in run.stage.shares})
    result = LawResult("log_linear", "mixture", limits=_limits(settings, runs))
    trained = np.array([[run.share(name) for name in datasets] for run in runs])
    independent = int(np.linalg.matrix_rank(trained - trained.mean(axis=0), tol=1e-6))
    if len(datasets) < 2 or independent < len(datasets) - 1:
        raise DataError(
            f"the log-linear law has a parameter for each of the {len(datasets)} datasets ({', '.join(datasets)}), but "
            f"the mixtures of these runs vary in {independent} directions only: {len(datasets) - 1} are needed"
        )
    _add_points(result, settings, {run.name: row[:-1].tolist() for run, row in zip(runs, trained, strict=True)})
    for name, points in result.points.items():
        result.fits[name] = _fit_points(equations.log_linear(datasets), points, _losses(runs, name))
    result.values = {
        run.name: ", ".join(f"{name} {share:.3f}" for name, share in zip(datasets, row, strict=True))
        for run, row in zip(runs, trained, strict=True)
    }
    mixture = best_mixture(
        lambda row: sum(
            float(weight * result.fits[name].predict(row[None, :-1])[0]) for name, weight in settings.weights.items()
        ),
        [_room(result.fits[name], limit) for name, limit in result.limits.items()],
        trained,
        _highest_shares(settings, runs, datasets),
    )
    describe_mixture(result, settings, datasets, mixture)
    return result


def _room(fitted: Fit, limit: float) -> Callable[[Array], float]:
    return lambda row: float(limit - fitted.predict(row[None, :-1])[0])


def _highest_shares(settings: SweepFitConfig, runs: Sequence[MeasuredRun], datasets: Sequence[str]) -> Array | None:
    """The share of each dataset that repeats it `max_epochs` times in the stage."""
    if settings.max_epochs is None:
        return None
    found = []
    for name in datasets:
        shares = [
            settings.max_epochs * run.share(name) / use.epochs
            for run in runs
            if (use := run.stage.use_by_dataset.get(name)) is not None and use.epochs
        ]
        found.append(min(1.0, min(shares, default=1.0)))
    return np.array(found)


def _lr_curve(settings: SweepFitConfig, runs: Sequence[MeasuredRun]) -> LawResult:
    """The law of the loss curve in the learning rates, and the peak that it advises."""
    result = LawResult("lr_curve", "peak LR", limits=_limits(settings, runs))
    if len({tuple(sorted(run.stage.shares.items())) for run in runs}) > 1:
        raise DataError("the law of the learning rates needs runs with one mixture and replay fraction: these differ")
    before = {run.area_before for run in runs}
    if None in before or len(before) > 1:
        raise DataError(
            "the law of the learning rates needs the learning rates of all steps before the stage, the same ones in "
            "every run: these weights come from outside the run, or from different earlier stages"
        )
    peaks = [run.stage.peak_lr for run in runs]
    _require_values(peaks, 3, result.variable, "stages.NAME.lr.max")
    areas = {run.name: np.cumsum(run.lrs) for run in runs}
    annealed = {run.name: equations.annealing_areas(run.lrs, settings.annealing_decay) for run in runs}
    scale = max(float(area[-1]) for area in areas.values())
    start = float(before.pop() or 0.0) / scale

    def x_at(run: MeasuredRun, step: int) -> Array:
        return np.array([start, areas[run.name][step - 1] / scale, annealed[run.name][step - 1] / scale])

    for name in sorted({*settings.weights, *settings.limit}):
        points = [(run, step, losses[name]) for run in runs for step, losses in run.curve if name in losses]
        result.points[name] = [(run.name, x_at(run, step)) for run, step, _ in points]
        result.fits[name] = _fit_points(equations.lr_curve(), result.points[name], [loss for *_, loss in points])
    result.values = {run.name: f"{peak:.3g}" for run, peak in zip(runs, peaks, strict=True)}
    ends = np.stack([x_at(run, run.stage.steps) for run in runs])
    columns = [_interpolated(peaks, ends[:, column].tolist(), result.variable) for column in range(3)]

    def x_of(values: Array) -> Array:
        return np.stack([column(values) for column in columns], axis=1)

    choice = choose(settings.weights, _curves(result, settings, x_of), result.limits, peaks)
    describe(result, settings, choice, peaks, lambda value: f"{value:.3g}", "peak_lr")
    return result


def _domain_share(settings: SweepFitConfig, run: MeasuredRun) -> float:
    return sum(run.share(name) for name in settings.weights)


def _limits(settings: SweepFitConfig, runs: Sequence[MeasuredRun]) -> dict[str, float]:
    """The highest allowed losses: the mean loss before the stage, and the allowed rise."""
    limits = {}
    for name, rise in settings.limit.items():
        before = [run.before[name] for run in runs if name in run.before]
        if not before:
            raise DataError(f"sweep.fit.limit.{name}: no run has a validation loss of it before the stage")
        limits[name] = sum(before) / len(before) + rise
    return limits


def _require_values(values: Sequence[float], count: int, variable: str, key: str) -> None:
    distinct = len({round(value, 12) for value in values})
    if distinct < count:
        raise DataError(
            f"the runs have {distinct} different values of the {variable}, and the law needs {count}: add values of "
            f"{key} to [sweep]"
        )


def _add_points(result: LawResult, settings: SweepFitConfig, of_run: Mapping[str, Sequence[float]]) -> None:
    """One point for each run, the same for all datasets."""
    for name in sorted({*settings.weights, *settings.limit}):
        result.points[name] = [(run, np.array(x)) for run, x in of_run.items()]


def _losses(runs: Sequence[MeasuredRun], name: str) -> list[float]:
    return [run.end[name] for run in runs]


def _fit_points(equation: Equation, points: Sequence[tuple[str, Array]], losses: Sequence[float]) -> Fit:
    return fit_equation(equation, np.stack([x for _, x in points]), np.array(losses, dtype=np.float64))


def _column(values: Array) -> Array:
    return values[:, None]


def _curve(fitted: Fit, settings: SweepFitConfig, x_of: Callable[[Array], Array]) -> PredictedLoss:
    return PredictedLoss(
        lambda values: fitted.predict(x_of(values)),
        lambda values: fitted.half_width(x_of(values), settings.confidence),
    )


def _curves(result: LawResult, settings: SweepFitConfig, x_of: Callable[[Array], Array]) -> dict[str, PredictedLoss]:
    return {name: _curve(fitted, settings, x_of) for name, fitted in result.fits.items()}


def _interpolated(at: Sequence[float], values: Sequence[float], variable: str) -> Callable[[Array], Array]:
    """A quantity of the runs as a function of the decision variable, linear between the runs.

    Raises:
        DataError: two runs with the same value of the variable differ in it.
    """
    of_value: dict[float, float] = {}
    for key, value in zip(at, values, strict=True):
        if abs(of_value.setdefault(key, value) - value) > 1e-6 * max(1.0, abs(value)):
            raise DataError(
                f"two runs with the same {variable} ({key:.4g}) differ in another swept setting that the law depends "
                "on: sweep one setting at a time, or fit one value of the other"
            )
    keys = sorted(of_value)
    return lambda wanted: np.interp(wanted, keys, [of_value[key] for key in keys])
