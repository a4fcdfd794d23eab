"""Curves of the report: points over tokens, for each run or, of many runs, for the seeds of each configuration."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, TypeVar

from titan_cpt.common.run_folder import CONFIG_FILE
from titan_cpt.common.weights.named_weights import AVERAGE_SUFFIX, split_average
from titan_cpt.config.toml_files import parse_toml
from titan_cpt.reporting.run_log import RunLog

DRAWN_ONE_BY_ONE = 8
"""Up to this number of runs, each has a curve; of more runs, the seeds of one configuration share one."""
_MAX_POINTS = 500
_SMOOTHING_WINDOWS = 40  # a smoothed value is the mean over this part of the recorded steps
_SEED_IN_NAME = re.compile(r"[-_/ ]?seed[-_= ]?\d+")

T = TypeVar("T")
Place = tuple[str, int]  # a stage's name and the steps done in it


@dataclass(frozen=True)
class CurveGroup:
    """Runs that share a curve: one run, or the seeds of one configuration."""

    name: str
    runs: Sequence[RunLog]


@dataclass(frozen=True)
class Curve:
    """Points of a curve.

    Attributes:
        number: index of the curve's group, which gives the color.
        tokens: tokens trained on, in increasing order.
        values: the mean over the group's runs. `low` and `high` are the smallest and the largest value.
        places: stage and step of each point.
        breaks: indices from which on the points are not comparable with those before.
        is_average: the values are of the average of the weights.
    """

    number: int
    tokens: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    places: Sequence[Place]
    breaks: Sequence[int] = ()
    is_average: bool = False


def curve_groups(runs: Sequence[RunLog]) -> list[CurveGroup]:
    """The runs one by one; of more than `DRAWN_ONE_BY_ONE`, those that differ only in name and seed together."""
    if len(runs) <= DRAWN_ONE_BY_ONE:
        return [CurveGroup(run.name, [run]) for run in runs]
    return seed_groups(runs)


def seed_groups(runs: Sequence[RunLog]) -> list[CurveGroup]:
    """The runs that differ only in name and seed together."""
    found: dict[str, list[RunLog]] = {}
    for run in runs:
        found.setdefault(_configuration(run), []).append(run)
    return [CurveGroup(_group_name(seeds), seeds) for seeds in found.values()]


def _configuration(run: RunLog) -> str:
    """A text that is the same for all seeds of a configuration.

    It is config.toml without name, folder and seed. Without that file: the plan and the name without its seed.
    """
    path = run.folder / CONFIG_FILE
    try:
        config: Mapping[str, Any] = parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = {}
    if isinstance(config.get("job"), dict):
        job = {key: value for key, value in config["job"].items() if key not in ("name", "output_dir", "seed")}
        return json.dumps(dict(config) | {"job": job}, sort_keys=True, default=str)
    if not _SEED_IN_NAME.search(run.name):
        return str(run.folder.resolve())
    plan = {key: value for key, value in run.plan.items() if key not in ("name", "fingerprint")}
    return _SEED_IN_NAME.sub("", run.name) + json.dumps(plan, sort_keys=True)


def _group_name(runs: Sequence[RunLog]) -> str:
    if len(runs) == 1:
        return runs[0].name
    names = {_SEED_IN_NAME.sub("", run.name) for run in runs}
    name = names.pop() if len(names) == 1 else f"{runs[0].name} and others"
    return f"{name.strip('-_/ ') or runs[0].name} ({len(runs)} seeds)"


def measured_labels(runs: Sequence[RunLog], key: str = "loss_nats_per_token") -> list[str]:
    """The labels of validation lines with this value; the losses of an average have the label of the weights."""
    return sorted(
        {split_average(line["dataset"])[0] for run in runs for line in run.validations if line.get(key) is not None}
    )


def curves_with_averages(groups: Sequence[CurveGroup], label: str, key: str = "loss_nats_per_token") -> list[Curve]:
    """`validation_curves` of the weights, followed by those of their averages where there are some."""
    averages = validation_curves(groups, f"{label}{AVERAGE_SUFFIX}", key)
    return [
        *validation_curves(groups, label, key),
        *(replace(curve, is_average=True) for curve in averages if curve.tokens),
    ]


def validation_curves(groups: Sequence[CurveGroup], dataset: str, key: str = "loss_nats_per_token") -> list[Curve]:
    """Validation losses of a dataset, or another value of its lines such as its forgetting."""

    def read(run: RunLog) -> dict[Place, float]:
        lines = [line for line in run.validations if line["dataset"] == dataset and line.get(key) is not None]
        return {(line["stage"], line["step"]): line[key] for line in lines}

    curves = []
    for number, group in enumerate(groups):
        curve = _curve(group, number, read)
        lines = {
            (line["stage"], line["step"]): line for line in group.runs[0].validations if line["dataset"] == dataset
        }
        measured = [lines[place] for place in curve.places]
        breaks = [
            index
            for index in range(1, len(measured))
            if not group.runs[0].comparable(measured[index - 1], measured[index])
        ]
        curves.append(Curve(**{**vars(curve), "breaks": breaks}))
    return curves


def training_curves(groups: Sequence[CurveGroup], key: str, *, smooth: bool = False) -> list[Curve]:
    """A value of the lines of training steps, such as `lr` or `grad_norm`; at most `_MAX_POINTS` of each run."""

    def read(run: RunLog) -> dict[Place, float]:
        values = {(line["stage"], line["step"]): line[key] for line in run.trains if line.get(key) is not None}
        return _thinned(_smoothed(values) if smooth else values)

    return [_curve(group, number, read) for number, group in enumerate(groups)]


def trained_sources(runs: Sequence[RunLog]) -> list[tuple[str, str]]:
    """(key of a train line, name) of every source whose training loss the runs recorded, new data before replay."""
    keys = ("loss_by_source", "replay_loss_by_source")
    return [
        (key, name)
        for key in keys
        for name in sorted({name for run in runs for line in run.trains for name in line.get(key) or ()})
    ]


def curves_of_source(groups: Sequence[CurveGroup], key: str, name: str) -> list[Curve]:
    """The smoothed training loss of one source, see `trained_sources`."""

    def read(run: RunLog) -> dict[Place, float]:
        lines = ((line, (line.get(key) or {}).get(name)) for line in run.trains)
        return _thinned(_smoothed({(line["stage"], line["step"]): loss for line, loss in lines if loss is not None}))

    return [_curve(group, number, read) for number, group in enumerate(groups)]


def replay_curves(groups: Sequence[CurveGroup]) -> list[Curve]:
    """Replayed tokens in percent of each step's tokens, smoothed.

    A step replays whole sequences, such as 1 or 2 of 32 for 5 percent. If only some steps are recorded, always the
    2 could be, so that such a stage has its planned percentage.
    """

    def read(run: RunLog) -> dict[Place, float]:
        planned = _planned_replay(run)
        shares = {}
        for line in run.trains:
            tokens = run.tokens.stages[line["stage"]].of_step(line["step"])
            if line.get("replayed_tokens") is not None and tokens:
                share = planned.get(line["stage"], 100 * line["replayed_tokens"] / tokens)
                shares[line["stage"], line["step"]] = share
        return _thinned(_smoothed(shares))

    return [_curve(group, number, read) for number, group in enumerate(groups)]


def _planned_replay(run: RunLog) -> dict[str, float]:
    """Planned percentage of replay of the stages of which some steps are not recorded."""
    steps = [(line["stage"], line["step"]) for line in run.trains]
    recorded, last = Counter(stage for stage, _ in steps), dict(steps)
    return {
        stage["name"]: 100 * sum(use["replayed_tokens"] for use in stage["datasets"].values()) / stage["tokens"]
        for stage in run.plan["stages"]
        if stage["tokens"] and recorded[stage["name"]] < last.get(stage["name"], 0)
    }


def _curve(group: CurveGroup, number: int, read: Callable[[RunLog], Mapping[Place, float]]) -> Curve:
    """The curve of a group: at the places that all of its runs have."""
    of_runs = [read(run) for run in group.runs]
    places = [place for place in of_runs[0] if all(place in other for other in of_runs)]
    values = [[of_run[place] for of_run in of_runs] for place in places]
    return Curve(
        number=number,
        tokens=[group.runs[0].tokens_at(*place) for place in places],
        values=[mean(each) if len(each) > 1 else each[0] for each in values],
        low=[min(each) for each in values],
        high=[max(each) for each in values],
        places=places,
    )


def recorded_steps(run: RunLog) -> list[Mapping[str, Any]]:
    """The lines of training steps that figures draw: at most `_MAX_POINTS`, and those at the borders of stages."""
    lines: dict[Place, Mapping[str, Any]] = {(line["stage"], line["step"]): line for line in run.trains}
    return list(_thinned(lines).values())


def _thinned(values: Mapping[Place, T]) -> dict[Place, T]:
    """Every n-th value, with the first and the last one of each stage."""
    places = list(values)
    every = -(-len(places) // _MAX_POINTS) or 1
    kept = set(places[::every])
    for index, place in enumerate(places):
        if index in (0, len(places) - 1) or place[0] != places[index - 1][0] or place[0] != places[index + 1][0]:
            kept.add(place)
    return {place: value for place, value in values.items() if place in kept}


def _smoothed(values: Mapping[Place, float]) -> dict[Place, float]:
    """The mean of each value and those before it in its stage, up to 1/40 of all values."""
    window = max(1, len(values) // _SMOOTHING_WINDOWS)
    smoothed: dict[Place, float] = {}
    recent: deque[float] = deque()
    total, stage = 0.0, ""
    for place, value in values.items():
        if place[0] != stage:
            stage, total = place[0], 0.0
            recent.clear()
        recent.append(value)
        total += value
        if len(recent) > window:
            total -= recent.popleft()
        smoothed[place] = total / len(recent)
    return smoothed
