"""The speed goals on one GPU, and which of them a result file of race.py reaches.

    python scripts/bench/speed/goals.py races.json [races.json ...]     # prints a Markdown table

A goal without figures of a real run on a GPU is "not run". Later files replace races of earlier ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, Any]]
REACHED, MISSED, NOT_RUN = "reached", "missed", "not run"


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio of two contestants' figures in one race.

    Attributes:
        ratio: returns the ratio and between whom it is, or None if one of them did not run.
        at_least: whether the bound is a lower one.
    """

    text: str
    race: str
    bound: float
    ratio: Callable[[Rows], tuple[float, str] | None]
    at_least: bool = True


def speed(row: dict[str, Any]) -> float:
    """Tokens per second relative to the reference in the same turns, so that rows of different heats compare."""
    reference: float | None = row.get("reference_tokens_per_s")
    return float(row["tokens_per_s"]) / (reference or 1.0)


def fastest(rows: Rows, *, float8: bool = False) -> dict[str, Any] | None:
    """The fastest of titan_cpt's variants, in float8 or not; other builds of titan_cpt do not count."""
    ours = [row for row in rows.values() if row["kind"] == "ours" and not row["variant"].startswith("baseline")]
    ours = [row for row in ours if ("float8.recipe_name" in row["overrides"]) == float8]
    return max(ours, key=speed, default=None)


def over(peer: str) -> Callable[[Rows], tuple[float, str] | None]:
    """The speed of titan_cpt's fastest variant over a peer's."""

    def ratio(rows: Rows) -> tuple[float, str] | None:
        ours, other = fastest(rows), rows.get(peer)
        return None if ours is None or other is None else (speed(ours) / speed(other), f"{ours['name']} / {peer}")

    return ratio


def memory_over(peer: str) -> Callable[[Rows], tuple[float, str] | None]:
    """The peak of allocated memory of titan_cpt's fastest variant over a peer's."""

    def ratio(rows: Rows) -> tuple[float, str] | None:
        ours, other = fastest(rows), rows.get(peer)
        if ours is None or other is None:
            return None
        return ours["peak_gib"] / other["peak_gib"], f"{ours['name']} / {peer}"

    return ratio


def float8_over_bfloat16(rows: Rows) -> tuple[float, str] | None:
    """The fastest float8 variant over the fastest one without."""
    eight, half = fastest(rows, float8=True), fastest(rows)
    if eight is None or half is None:
        return None
    return speed(eight) / speed(half), f"{eight['name']} / {half['name']}"


PLAIN, TITAN, BASELINE = "plain loop, compiled", "torchtitan, compiled", "baseline build, eager"
GOALS = (
    Goal("G405: speed >= 1.12x the plain compiled loop", "G405", 1.12, over(PLAIN)),
    Goal("G405: speed >= 1.8x HF Trainer", "G405", 1.8, over("HF Trainer")),
    Goal("G405: peak memory <= 0.9x the plain compiled loop's", "G405", 0.9, memory_over(PLAIN), at_least=False),
    Goal("L1B: speed >= 1.12x torchtitan compiled", "L1B", 1.12, over(TITAN)),
    Goal("Q: speed >= 4x the baseline build with its quick start's settings", "Q", 4.0, over(BASELINE)),
    # Not a goal but a check of what `titan-cpt plan` says of this shape: float8 is not faster there.
    Goal("L1B: float8 <= 1x titan_cpt in bfloat16, as the plan says", "L1B", 1.0, float8_over_bfloat16, at_least=False),
    Goal("W4096: float8 >= 1.15x titan_cpt in bfloat16", "W4096", 1.15, float8_over_bfloat16),
)


def verdicts(races: Iterable[dict[str, Any]], *, dry_run: bool = False) -> list[dict[str, Any]]:
    """Every goal with the ratio found and one of reached, missed, not run.

    Args:
        races: the entries of "races" of a result file.
        dry_run: the figures are those of tiny shapes, so no goal was run.
    """
    found = {
        race["key"]: {row["name"]: row for row in race["contestants"] if row["status"] == "ran"}
        for race in races
        if race["device"] == "cuda" and not dry_run
    }
    lines = []
    for goal in GOALS:
        ratio = goal.ratio(found.get(goal.race, {}))
        line: dict[str, Any] = {"goal": goal.text, "ratio": None, "of": "", "verdict": NOT_RUN}
        if ratio is not None:
            value, between = ratio
            reached = value >= goal.bound if goal.at_least else value <= goal.bound
            line |= {"ratio": value, "of": between, "verdict": REACHED if reached else MISSED}
        lines.append(line)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """The verdicts as a Markdown table."""
    rows = ["| goal | found | verdict |", "|---|---|---|"]
    for line in lines:
        found = "" if line["ratio"] is None else f"{line['ratio']:.2f}x ({line['of']})"
        rows.append(f"| {line['goal']} | {found} | {_emphasized(line['verdict'])} |")
    return "\n".join(rows)


def _emphasized(verdict: str) -> str:
    return f"**{verdict}**" if verdict == MISSED else verdict


def main(arguments: list[str]) -> None:
    """Print the table of the files."""
    if not arguments or any(word.startswith("-") for word in arguments):
        sys.exit(__doc__)
    races: dict[str, dict[str, Any]] = {}
    for name in arguments:
        result = json.loads(Path(name).read_text(encoding="utf-8"))
        if not result["dry_run"]:
            races |= {race["key"]: race for race in result["races"]}
    print(table(verdicts(races.values())))


if __name__ == "__main__":
    main(sys.argv[1:])
