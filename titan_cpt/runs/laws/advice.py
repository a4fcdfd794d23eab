"""What a fitted law advises, in sentences and as numbers for programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from titan_cpt.config.sweep import SweepFitConfig
from titan_cpt.runs.laws.decisions import Choice
from titan_cpt.runs.laws.fitting import Array, Fit

EXTRAPOLATED = "EXTRAPOLATED beyond the trained values"


@dataclass
class LawResult:
    """A fitted law.

    Attributes:
        variable: what the law's decision is about, in words.
        fits: of each dataset, on the points of all runs.
        points: of each dataset, (name of the run, x) of each point, in the order of the fit's residuals.
        values: the decision variable of each run, as text.
        limits: highest allowed loss of each limited dataset, in nats per token.
        answers: what the law advises, in sentences.
        answer: the same for programs.
    """

    law: str
    variable: str
    fits: dict[str, Fit] = field(default_factory=dict)
    points: dict[str, list[tuple[str, Array]]] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)


def describe_share(result: LawResult, settings: SweepFitConfig, choice: Choice, shares: Sequence[float]) -> None:
    """Describe a choice of the domain's share."""
    describe(result, settings, choice, shares, lambda value: f"{value:.4f}", "share")
    if choice.value is not None:
        result.answer["other_share"] = 1 - choice.value
        result.answers.append(
            f"the other {1 - choice.value:.4f} of the sequences are of other datasets (the replay fraction, where they "
            "are replay)"
        )


def describe(
    result: LawResult,
    settings: SweepFitConfig,
    choice: Choice,
    trained: Sequence[float],
    text: Callable[[float], str],
    key: str,
) -> None:
    """The sentences and the numbers of a choice."""
    low, high = min(trained), max(trained)
    result.answer |= {
        key: choice.value,
        "low": choice.low,
        "high": choice.high,
        "confidence": settings.confidence,
        "trained": [low, high],
        "at_edge": choice.at_edge,
        "losses": dict(choice.losses),
    }
    if choice.value is None:
        result.answers.append(
            f"no {result.variable} between {text(low)} and {text(high)} keeps the limits, by the law; values outside "
            "were not trained, so none is given: train runs there"
        )
        return
    open_ = "undetermined, as with losses at the upper end of their intervals no trained value keeps the limits"
    known = choice.low is not None and choice.high is not None
    interval = f"{text(choice.low or 0.0)} to {text(choice.high or 0.0)}" if known else open_
    result.answers.append(
        f"{result.variable} with the lowest objective{' within the limits' if result.limits else ''}: "
        f"{text(choice.value)} ({settings.confidence:.0%} interval: {interval}; trained values: {text(low)} to "
        f"{text(high)})"
    )
    if choice.at_edge:
        result.answers.append(
            f"this is the edge of the trained values: a better {result.variable} may be outside; train runs there"
        )
    result.answers.append(
        "predicted losses there: " + ", ".join(f"{name} {loss:.4f}" for name, loss in choice.losses.items())
    )


def describe_mixture(
    result: LawResult, settings: SweepFitConfig, datasets: Sequence[str], mixture: Array | None
) -> None:
    """The sentences and the numbers of a mixture; None: no trained combination keeps the limits."""
    if mixture is None:
        result.answer["mixture"] = None
        result.answers.append(
            "no combination of the trained mixtures keeps the limits, by the law; mixtures outside were not trained, "
            "so none is given: train runs there"
        )
        return
    shares = {name: float(share) for name, share in zip(datasets, mixture, strict=True)}
    row = mixture[None, :-1]
    losses = {
        name: (float(fitted.predict(row)[0]), float(fitted.half_width(row, settings.confidence)[0]))
        for name, fitted in result.fits.items()
    }
    result.answer |= {"mixture": shares, "losses": {name: loss for name, (loss, _) in losses.items()}}
    result.answer |= {"half_widths": {name: half for name, (_, half) in losses.items()}}
    result.answers.append(
        "mixture with the lowest objective, among combinations of the trained ones: "
        + ", ".join(f"{name} = {share:.4f}" for name, share in shares.items())
    )
    result.answers.append(
        f"predicted losses there, with {settings.confidence:.0%} intervals: "
        + ", ".join(f"{name} {loss:.4f} +- {half:.4f}" for name, (loss, half) in losses.items())
    )
