"""Tables and figure of the curve over tokens, from the metrics of its finished runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from curve_rules import (
    FIVE,
    HALF,
    INFINITE,
    LENGTHS,
    LOW,
    NONE,
    QUARTER,
    SHIFTS,
    Point,
    curve_claims,
    fit_law,
    gap_points,
    name_of,
    point,
    prediction_of_last,
)
from reproduce import end_of, end_of_first_stage, tables
from verdicts import End, Runs

from titan_cpt.reporting.run_log import RunLog, read_run

ARMS = {
    "no replay": NONE,
    "5 % replay": FIVE,
    "25 % replay": QUARTER,
    "50 % replay": HALF,
    "lowest LR, 25 % replay": LOW,
    "infinite, 25 % replay": INFINITE,
}
ARMS_OF = {"strong": tuple(ARMS.values()), "weak": (NONE, FIVE, QUARTER)}
"""What is trained; a row without results stays empty."""
SWEEPS = ("strong_union", "strong_replay", "strong_low", "strong_infinite", "weak_union", "weak_replay")


def read_results(folder: Path) -> tuple[Runs, dict[int, float]]:
    """All results by (name, seed), and the exact tokens a parameter of one stage by its nominal steps.

    Nominal steps are a key of LENGTHS. A dry run has fewer steps; its plans say which by `nominal_steps`.
    """
    found: dict[tuple[str, int], End] = {}
    tokens: dict[int, float] = {}
    for path in sorted(path for name in SWEEPS for path in folder.glob(f"{name}/*/plan.json")):
        record = read_run(path.parent)
        sweep = path.parent.parent.name
        seed = int(re.findall(r"seed-(\d+)", path.parent.name)[0])
        steps = nominal_steps(record.plan)
        share = re.search(r"fraction-[\d.]+", path.parent.name)
        arm = f"{sweep.partition('_')[2]}/{share[0] if share else sweep.partition('_')[2]}"
        shift = sweep.partition("_")[0]
        found[name_of(shift, arm, steps), seed] = _end(record)
        tokens[steps] = tokens_per_parameter(record)
        if arm == NONE:
            found[f"{shift}_english/english@{steps}", seed] = end_of_first_stage(record)
    return found, tokens


def nominal_steps(plan: dict) -> int:
    """Steps of one stage in the config files: half of all steps."""
    return plan.get("nominal_steps") or sum(stage["steps"] for stage in plan["stages"]) // 2


def tokens_per_parameter(record: RunLog) -> float:
    """Of one stage: half the tokens of the run."""
    return record.plan["total_tokens"] / 2 / record.plan["model"]["parameters"]


def _end(record: RunLog) -> End:
    """The final numbers; joint training forgets nothing."""
    end = end_of(record)
    return end if len(record.plan["stages"]) > 1 else replace(end, forgetting=math.nan)


def curve_text(runs: Runs, tokens: dict[int, float]) -> str:
    """Markdown: gaps by length and arm, forgetting, the law, and the tables of claims and losses."""
    parts = []
    for shift, new in SHIFTS.items():
        parts.append(f"## Gap to joint training, {shift} shift (English and {new})\n\n{_gaps(runs, shift, tokens)}")
        parts.append(f"## Forgetting, {shift} shift\n\n{_forgetting(runs, shift, tokens)}")
        parts.append(f"## Law, {shift} shift\n\n{_laws(runs, shift, tokens)}")
    parts.append(f"## Verdicts and losses\n\n{tables(curve_claims(), runs)}")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _columns(tokens: dict[int, float]) -> str:
    cells = [f"{tokens[steps]:.1f}" if steps in tokens else f"about {about}" for steps, about in LENGTHS.items()]
    return f"| tokens a parameter | {' | '.join(cells)} |\n{'|---' * (len(cells) + 1)}|"


def _gaps(runs: Runs, shift: str, tokens: dict[int, float]) -> str:
    rows = [_columns(tokens)]
    for words, arm in ARMS.items():
        points = {each.tokens: each for each in gap_points(runs, shift, arm, tokens)}
        cells = [_cell(points.get(tokens.get(steps, LENGTHS[steps]))) for steps in LENGTHS]
        if points or arm in ARMS_OF[shift]:
            rows.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(rows)


def forgetting_points(runs: Runs, shift: str, arm: str) -> dict[int, Point]:
    """Mean forgetting by steps."""
    found = {}
    for steps in LENGTHS:
        values = [end.forgetting for (name, _), end in sorted(runs.items()) if name == name_of(shift, arm, steps)]
        if values:
            found[steps] = point(LENGTHS[steps], values)
    return found


def _forgetting(runs: Runs, shift: str, tokens: dict[int, float]) -> str:
    rows = [_columns(tokens)]
    for words, arm in ARMS.items():
        points = forgetting_points(runs, shift, arm)
        if points or arm in ARMS_OF[shift]:
            rows.append(f"| {words} | {' | '.join(_cell(points.get(steps)) for steps in LENGTHS)} |")
    return "\n".join(rows)


def _laws(runs: Runs, shift: str, tokens: dict[int, float]) -> str:
    rows = ["| run | a | b | residuals | holds | last length from the others | measured | |", "|---" * 8 + "|"]
    for words, arm in ARMS.items():
        points = gap_points(runs, shift, arm, tokens)
        law = fit_law(points)
        if law is None:
            continue
        left = ", ".join(f"{each:+.4f}" for each in law.residuals)
        holds = {None: "too few points", True: "yes", False: "no"}[law.holds(points)]
        ahead = prediction_of_last(points)
        last = "" if ahead is None else f"{ahead[0]:.4f} | {points[-1].value:.4f} | {'close' if ahead[1] else 'off'}"
        scale, exponent = _with_error(law.scale, law.scale_error), _with_error(law.exponent, law.exponent_error)
        rows.append(f"| {words} | {scale} | {exponent} | {left} | {holds} | {last or ' | | '} |")
    return "\n".join(rows) if len(rows) > 2 else "Not run."


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _cell(each: Point | None) -> str:
    return "" if each is None else f"{_with_error(each.value, each.error)} ({each.seeds})"


def draw(runs: Runs, tokens: dict[int, float], path: Path) -> None:
    """The gap against tokens a parameter with the fitted law, and forgetting against replay, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    gaps, forgotten = figure.subplots(1, 2)
    for words, arm in ARMS.items():
        points = gap_points(runs, "strong", arm, tokens)
        if points:
            gaps.errorbar(*_series(points), marker="o", linestyle="none", label=words, capsize=3)
            _draw_law(gaps, points)
    gaps.axhline(0, color="0.6", linewidth=0.8)
    gaps.set(xscale="log", xlabel="tokens a parameter in each stage", ylabel="AVG minus joint training, nats a token")
    gaps.set_title("Gap to joint training, strong shift", fontsize=10)
    for shift, line in (("strong", "-"), ("weak", "--")):
        for number, steps in enumerate(LENGTHS):
            shares = [(float(arm.rpartition("-")[2]), arm) for arm in (NONE, FIVE, QUARTER, HALF)]
            measured = [(share, forgetting_points(runs, shift, arm).get(steps)) for share, arm in shares]
            known = [(100 * share, each.value) for share, each in measured if each is not None]
            if known:
                label = f"{shift}, {LENGTHS[steps]} tokens"
                forgotten.plot(*zip(*known, strict=True), line, marker="o", color=f"C{number}", label=label)
    forgotten.set(xlabel="replay, %", ylabel="forgetting, nats a token")
    forgotten.set_title("Forgetting against replay", fontsize=10)
    for axes in (gaps, forgotten):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _series(points: Sequence[Point]) -> tuple[list[float], list[float], list[float]]:
    return [p.tokens for p in points], [p.value for p in points], [p.error or 0.0 for p in points]


def _draw_law(axes, points: Sequence[Point]) -> None:
    law = fit_law(points)
    if law is not None:
        ends = points[0].tokens, points[-1].tokens
        at = [ends[0] * (ends[1] / ends[0]) ** (number / 30) for number in range(31)]
        axes.plot(at, [law.at(each) for each in at], color=axes.containers[-1].lines[0].get_color(), linewidth=1)


def as_record(runs: Runs, tokens: dict[int, float]) -> str:
    """The gaps of every arm as JSON, for other programs."""
    record = {
        shift: {words: [vars(each) for each in gap_points(runs, shift, arm, tokens)] for words, arm in ARMS.items()}
        for shift in SHIFTS
    }
    return json.dumps(record, indent=1) + "\n"
