"""Claims and their verdicts: a difference compared with its standard error over seeds, by rules fixed in advance.

A claim has one or more parts, each a difference that is paired by seed:

- *above*: the claim is d > 0. Shown if mean d > 2 standard errors, contradicted if mean d < -2 standard errors.
- *within*: the claim is that d is at most a margin of 1 % of the reference loss (on one side, or on both sides with
  "level"). Shown if d + 2 standard errors is within the margin, contradicted if d - 2 standard errors is beyond it.

Everything between is "not shown". A claim is shown if all its parts are, contradicted if one is. A single seed has no
standard error: the sign of d then decides between "as claimed" and "not as claimed"; such a part is never "shown".
A part may require more than 2 standard errors: averages_claims.py does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Literal

MARGIN = 0.01  # of the reference loss
ERRORS = 2.0

Verdict = Literal["shown", "not shown", "contradicted", "as claimed", "not as claimed", "not run"]
Losses = Mapping[str, float]


@dataclass(frozen=True)
class End:
    """The final numbers of a run, in nats per token.

    Attributes:
        losses: the final loss on every dataset.
        forgetting: of the old data; NaN if there is none.
        rise: the largest rise of the English loss above its value at a stage's start, over all stages after the first.
    """

    losses: Losses
    forgetting: float
    rise: float

    @property
    def average(self) -> float:
        """The plain mean over the datasets."""
        return mean(self.losses.values())


Runs = Mapping[tuple[str, int], End]
"""By (sweep/run without its seed, seed)."""


@dataclass(frozen=True)
class Part:
    """One difference that is evidence for a claim.

    Attributes:
        what: its description in the table.
        runs: the sweep runs that it needs, each without the seed in its name.
        difference: of one seed, in nats per token.
        rule: above, within (one side) or level (both sides); see the module's docstring.
        reference: the loss whose 1 % is the margin; not used by above.
        errors: from the number of seeds (at least 2), the standard errors by which a difference must be beyond a limit.
    """

    what: str
    runs: Sequence[str]
    difference: Callable[[Mapping[str, End]], float]
    rule: Literal["above", "within", "level"] = "above"
    reference: Callable[[Mapping[str, End]], float] = lambda _: 0.0
    errors: Callable[[int], float] = lambda _: ERRORS


@dataclass(frozen=True)
class Claim:
    """A statement of a paper that the runs test."""

    name: str
    statement: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Finding:
    """The measured difference of a part, and its verdict.

    Attributes:
        error: standard error of the mean difference over seeds; None with one seed.
        margin: the largest difference that the rule allows; 0 for above.
    """

    part: Part
    seeds: int
    difference: float
    error: float | None
    margin: float
    verdict: Verdict


def judge(part: Part, runs: Runs) -> Finding:
    """The finding over all seeds for which every run of the part has a result."""
    seeds = sorted({seed for _, seed in runs})
    whole = [seed for seed in seeds if all((name, seed) in runs for name in part.runs)]
    if not whole:
        return Finding(part, 0, math.nan, None, math.nan, "not run")
    chosen = [{name: runs[name, seed] for name in part.runs} for seed in whole]
    found = [part.difference(each) for each in chosen]
    margin = 0.0 if part.rule == "above" else MARGIN * mean(part.reference(each) for each in chosen)
    error = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    errors = ERRORS if error is None else part.errors(len(found))
    verdict = verdict_of(part.rule, mean(found), error, margin, errors)
    return Finding(part, len(found), mean(found), error, margin, verdict)


def verdict_of(rule: str, difference: float, error: float | None, margin: float, errors: float = ERRORS) -> Verdict:
    """Apply the rules of the module's docstring: a difference counts from `errors` standard errors on."""
    value = abs(difference) if rule == "level" else difference
    if error is None:
        good = value > 0 if rule == "above" else value <= margin
        return "as claimed" if good else "not as claimed"
    beyond = errors * error
    if rule == "above":
        return "shown" if value > beyond else "contradicted" if value < -beyond else "not shown"
    if value + beyond <= margin:
        return "shown"
    return "contradicted" if value - beyond > margin else "not shown"


def verdict_on(findings: Sequence[Finding]) -> Verdict:
    """The verdict on a claim: the worst of those on its parts."""
    found = {finding.verdict for finding in findings}
    order: tuple[Verdict, ...] = ("contradicted", "not as claimed", "not run", "not shown", "as claimed", "shown")
    return next(verdict for verdict in order if verdict in found)


def _loss(dataset: str, run: str) -> Callable[[Mapping[str, End]], float]:
    return lambda ends: ends[run].losses[dataset]


def claims(prefix: str = "") -> list[Claim]:
    """C1 to C10; `prefix` is `quick_` for the runs of the short set, which tests only C1, C2 and C6."""
    new = "german"
    none, some, ten, quarter = (f"{prefix}replay/fraction-{share}" for share in ("0", "0.01", "0.1", "0.25"))
    five = f"{prefix}replay/fraction-0.05"
    low = f"{prefix}constant/lr-" + ("constant-0.0003" if prefix else "0.0003")
    union = f"{prefix}union/{prefix}union"
    c1 = Claim(
        "C1",
        "re-warming and re-decaying adapts better than staying at the lowest LR",
        [Part("German, low LR minus re-warmed", [low, none], lambda e: e[low].losses[new] - e[none].losses[new])],
    )
    cost = five if prefix else ten
    c2 = Claim(
        "C2",
        "replay cuts forgetting and costs the new data almost nothing"
        + ("" if prefix else "; 1 % already removes much"),
        [
            Part(
                f"forgetting, none minus {'5' if prefix else '10'} %",
                [none, cost],
                lambda e: e[none].forgetting - e[cost].forgetting,
            ),
            Part(
                f"German, {'5' if prefix else '10'} % minus none",
                [none, cost],
                lambda e: e[cost].losses[new] - e[none].losses[new],
                "within",
                _loss(new, none),
            ),
        ],
    )
    c6 = Claim(
        "C6",
        "re-warming, re-decaying and replay reach the union's mean loss at half its compute",
        [
            Part(
                "AVG, 25 % minus union",
                [quarter, union],
                lambda e: e[quarter].average - e[union].average,
                "within",
                lambda e: e[union].average,
            )
        ],
    )
    if prefix:
        return [c1, c2, c6]
    much = Part(
        "forgetting, three quarters of none's minus 1 %'s",
        [none, some],
        lambda e: 0.75 * e[none].forgetting - e[some].forgetting,
    )
    c2 = replace(c2, parts=[*c2.parts, much])
    return [c1, c2, _c3(none, five), _c4(none), _c5(), c6, _c7(), _c8(), _c9(), _c10()]


def _c3(none: str, five: str) -> Claim:
    weak, weak_five = "weak/fraction-0", "weak/fraction-0.05"
    return Claim(
        "C3",
        "the stronger shift forgets more and needs more replay",
        [
            Part("forgetting, strong minus weak", [none, weak], lambda e: e[none].forgetting - e[weak].forgetting),
            Part(
                "forgetting that 5 % leaves, strong minus weak",
                [five, weak_five],
                lambda e: e[five].forgetting - e[weak_five].forgetting,
            ),
        ],
    )


def _c4(one_percent: str) -> Claim:
    def part(share: str, percent: str) -> Part:
        run = f"warmup/warmup_until-{share}"
        return Part(
            f"German, warm-up of {percent} % minus 1 %",
            [run, one_percent],
            lambda e: e[run].losses["german"] - e[one_percent].losses["german"],
            "level",
            _loss("german", one_percent),
        )

    shares = [("0", "0"), ("0.005", "0.5"), ("0.02", "2")]
    return Claim("C4", "the length of the warm-up does not matter in the end", [part(*share) for share in shares])


def _c5() -> Claim:
    half, twice = "peak/max-0.0015", "peak/max-0.006"
    return Claim(
        "C5",
        "a higher peak adapts more and forgets more",
        [
            Part(
                "German, half minus twice",
                [half, twice],
                lambda e: e[half].losses["german"] - e[twice].losses["german"],
            ),
            Part("forgetting, twice minus half", [half, twice], lambda e: e[twice].forgetting - e[half].forgetting),
        ],
    )


def _c7() -> Claim:
    low, same, twice = "same/lr-constant-0.0003", "same/lr-cosine-0.003-0.01", "same/lr-cosine-0.006-0.01"
    return Claim(
        "C7",
        "re-warming hurts even on the same data, more from a higher peak",
        [
            Part("highest rise of English, re-warmed minus low LR", [low, same], lambda e: e[same].rise - e[low].rise),
            Part("highest rise of English, twice minus once", [same, twice], lambda e: e[twice].rise - e[same].rise),
        ],
    )


def _c8() -> Claim:
    cosine = "english/english"  # the first stage of replay/fraction-0
    parts = [
        Part(
            f"English, {name.replace('-', ' ')} minus cosine",
            [run, cosine],
            lambda e, run=run: e[run].losses["english"] - e[cosine].losses["english"],
            "level",
            _loss("english", cosine),
        )
        for name, run in ((name, f"infinite/lr-{name}") for name in ("infinite-cosine", "infinite-inv-sqrt"))
    ]
    return Claim("C8", "infinite schedules end level with a cosine on one dataset", parts)


def _c9() -> Claim:
    cosine, infinite = "splits_cosine/splits_cosine", "splits_infinite/splits_infinite"
    return Claim(
        "C9",
        "over IID splits infinite schedules hardly forget between splits, and can anneal at any time",
        [
            Part(
                "highest rise of English after the first split, re-warmed minus infinite",
                [cosine, infinite],
                lambda e: e[cosine].rise - e[infinite].rise,
            ),
            Part(
                "English at the end, infinite minus re-warmed",
                [cosine, infinite],
                lambda e: e[infinite].losses["english"] - e[cosine].losses["english"],
                "within",
                _loss("english", cosine),
            ),
        ],
    )


def _c10() -> Claim:
    one_by_one, mixed = "domains/domains", "mixed/mixed"
    return Claim(
        "C10",
        "domain after domain is worse than mixing",
        [Part("AVG, one by one minus mixed", [one_by_one, mixed], lambda e: e[one_by_one].average - e[mixed].average)],
    )
