"""Claims about averages of weights and about Reptile, with the rules that decide them. Written before any of the runs.

Measured is the loss after the last step, on 256 validation sequences of each language; AVG is the mean of English and
German; forgetting is the English loss minus its value at the end of the English stage. All differences are paired by
seed. The rules are those of verdicts.py with one change: a difference counts if it is beyond its limit by Student's t
(two-sided 95 %, by the number of seeds: 4.30 for three) times the standard error, not by twice the standard error.

    anneal      the LR decays to 0 over the last fifth (40 of 200 steps), a branch from the constant phase
    constant    the LR stays at its peak over these 40 steps
    average     of the constant run's weights over these 40 steps, from 10 snapshots, one every 4 steps
    cosine      one cosine to a tenth of the peak over the 200 steps

They have equal tokens, the same data in the same order, and 5 % replay.
"""

from __future__ import annotations

from verdicts import Claim, Part

STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided 95 %, by the number of seeds
SHAPES = ("linear", "sqrt", "cosine")
RAW = "averages_constant/averages_constant"
COSINE = "averages_cosine/fraction-0.05"
SHARES = {"5 %": "0.05", "25 %": "0.25"}


def errors_that_count(seeds: int) -> float:
    """Standard errors by which a difference must be beyond its limit: Student's t."""
    return STUDENT_T[min(seeds, max(STUDENT_T))]


def averaged(kind: str) -> str:
    """The result of an average: a shape of like_decay, or ema."""
    return f"averages_window/averaging-{'ema-24' if kind == 'ema' else f'like-decay-{kind}-40'}@average"


def annealed(shape: str) -> str:
    """The result of a branch whose LR decays in this shape."""
    return f"averages_anneal/decay-{shape}"


def with_reptile(share: str, step: str) -> str:
    """The result of Reptile with this step and this share of replay."""
    return f"averages_reptile/fraction-{share}_step-{step}"


def averages_claims() -> list[Claim]:
    """A1 to A5 about averages, R1 to R5 about Reptile."""
    return [*_of_averages(), *_of_reptile()]


def _of_averages() -> list[Claim]:
    linear = averaged("linear")
    better = [_gain(f"AVG, last weights minus {kind}", RAW, averaged(kind)) for kind in (*SHAPES, "ema")]
    replaces = [
        _within(f"AVG, {shape} average minus {shape} anneal", averaged(shape), annealed(shape)) for shape in SHAPES
    ]
    level = [
        _within(f"AVG, {kind} minus linear", averaged(kind), linear, level=True) for kind in ("sqrt", "cosine", "ema")
    ]
    return [
        Claim("A1", "an average of the constant phase is better than its last weights", better),
        Claim("A2", "an average replaces the annealing whose shape it imitates", replaces),
        Claim("A3", "an average gains at least half of what annealing gains", [_half(shape) for shape in SHAPES]),
        Claim(
            "A4",
            "a constant LR reaches the cosine at equal tokens, annealed or averaged",
            [
                _within("AVG, linear anneal minus cosine", annealed("linear"), COSINE),
                _within("AVG, linear average minus cosine", linear, COSINE),
            ],
        ),
        Claim("A5", "which average it is matters little", level),
    ]


def _half(shape: str) -> Part:
    branch, average = annealed(shape), averaged(shape)
    return Part(
        f"AVG, gain of the {shape} average minus half the anneal's",
        [RAW, branch, average],
        lambda e: (e[RAW].average - e[average].average) - 0.5 * (e[RAW].average - e[branch].average),
        errors=errors_that_count,
    )


def _of_reptile() -> list[Claim]:
    pairs = {
        step: [
            (percent, f"averages_cosine/fraction-{share}", with_reptile(share, step))
            for percent, share in SHARES.items()
        ]
        for step in ("0.1", "0.5")
    }
    forgetting, german, mean = (
        {step: [make(f"{percent}", alone, pulled) for percent, alone, pulled in each] for step, each in pairs.items()}
        for make in (_less_forgetting, _cost, _better_mean)
    )
    quarter = f"averages_cosine/fraction-{SHARES['25 %']}"
    return [
        Claim("R1", "Reptile (step 0.1) forgets less than replay without it", forgetting["0.1"]),
        Claim("R2", "Reptile (step 0.1) costs the new data almost nothing", german["0.1"]),
        Claim("R3", "Reptile (step 0.1) has a better mean loss than replay without it", mean["0.1"]),
        Claim(
            "R4",
            "5 % replay with Reptile (step 0.1) replaces 25 % without",
            [_within("AVG, 5 % with Reptile minus 25 % without", with_reptile("0.05", "0.1"), quarter)],
        ),
        Claim(
            "R5",
            "a weaker pull (step 0.5) forgets less at almost no cost to the new data",
            [*forgetting["0.5"], *german["0.5"]],
        ),
    ]


def _less_forgetting(percent: str, alone: str, pulled: str) -> Part:
    return Part(
        f"forgetting, {percent} without minus with Reptile",
        [alone, pulled],
        lambda e: e[alone].forgetting - e[pulled].forgetting,
        errors=errors_that_count,
    )


def _cost(percent: str, alone: str, pulled: str) -> Part:
    return Part(
        f"German, {percent} with Reptile minus without",
        [alone, pulled],
        lambda e: e[pulled].losses["german"] - e[alone].losses["german"],
        "within",
        lambda e: e[alone].losses["german"],
        errors=errors_that_count,
    )


def _better_mean(percent: str, alone: str, pulled: str) -> Part:
    return _gain(f"AVG, {percent} without minus with Reptile", alone, pulled)


def _gain(what: str, worse: str, better: str) -> Part:
    return Part(what, [worse, better], lambda e: e[worse].average - e[better].average, errors=errors_that_count)


def _within(what: str, run: str, reference: str, *, level: bool = False) -> Part:
    return Part(
        what,
        [run, reference],
        lambda e: e[run].average - e[reference].average,
        "level" if level else "within",
        lambda e: e[reference].average,
        errors=errors_that_count,
    )
