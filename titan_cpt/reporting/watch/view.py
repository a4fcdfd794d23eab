"""A run on one screen: state, stages, curves of losses, throughput, newest checkpoint, last events.

Every line fits the width, and all of them the height: datasets, stages and events that have no room are counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from titan_cpt.common.readable import (
    duration,
    loss,
    memory,
    rate,
    scientific,
    share,
    shortest_count,
    significant,
    steps,
)
from titan_cpt.common.run_folder import step_name
from titan_cpt.common.weights.named_weights import AVERAGE
from titan_cpt.reporting.run_state import FAILED, FINISHED, RUNNING
from titan_cpt.reporting.watch.run_follower import RunFollower, StepCurve
from titan_cpt.reporting.watch.sparkline import bucket_means, carried_on, sparkline

_WIDEST = 160
_WIDE = 100  # from here there is room for tokens
_LONGEST_NAME = 24
_FEWEST_LINES = 12
_MOST_EVENTS = 8
_HIDDEN_EVENTS = ("checkpoint", "skip", "upload")


@dataclass(frozen=True)
class Row:
    """A line of the screen, and how it is shown.

    Attributes:
        style: a style of rich; empty for plain text.
    """

    text: str
    style: str = ""


def screen(run: RunFollower, state: str, why: str, *, width: int, height: int, now: float) -> list[Row]:
    """The run as rows.

    Args:
        state: running, finished, stopped, failed, planned, in one word.
        why: the process of a running run, or the reason of a state; may be empty.
        now: Unix time.
    """
    width = min(width, _WIDEST)
    bars = _progress_rows(run, state, width)
    head = [*_head(run, state, why, now, width), *bars[:1], *_notes(run)]
    stages = bars[1:]
    losses = list(_loss_rows(run, width))
    events = list(_event_rows(run, width))
    speed = [Row(_speed(run))] if run.newest else []
    tail = list(_checkpoint_rows(run, now))
    room = max(height, _FEWEST_LINES) - len(head) - len(speed) - len(tail) - 3  # three blank lines
    shown_events = min(len(events), max(1, min(_MOST_EVENTS, room - len(stages) - len(losses))))
    room -= shown_events
    most_stages = max(1, min(len(stages), room - min(len(losses), max(3, room // 2))))
    rows = [*head, *_around(stages, most_stages, _position(run)), Row("")]
    rows += [*speed, Row(""), *_first(losses, max(2, room - most_stages))]
    rows += [Row(""), *tail, *(events[-shown_events:] if shown_events else [])]
    return [Row(row.text[:width], row.style) for row in rows]


def _head(run: RunFollower, state: str, why: str, now: float, width: int) -> Iterator[Row]:
    name = str(run.plan.get("name", run.folder.name))
    silent = _seconds_since_last_line(run, now)
    since = "" if math.isnan(silent) else f"last line {duration(silent)} ago"
    styles = {RUNNING: "bold green", FINISHED: "bold", FAILED: "bold red"}
    title = f"{name[: max(10, width - len(state) - len(since) - 4)]}  {state}"
    yield Row(f"{title}{since:>{max(0, width - len(title))}}", styles.get(state, "bold yellow"))
    if why:
        yield Row(f"  {why}")


def _notes(run: RunFollower) -> Iterator[Row]:
    if run.share_read < 0.999 and run.curves(run.stage).training.steps:
        yield Row(f"  reading metrics.jsonl: {run.share_read:.0%}")
    if run.damaged_lines:
        lines = "1 damaged line" if run.damaged_lines == 1 else f"{run.damaged_lines:,} damaged lines"
        yield Row(f"  metrics.jsonl: {lines} skipped", "yellow")


def _progress_rows(run: RunFollower, state: str, width: int) -> list[Row]:
    """A bar for the run, and one for each stage; all bars have the same length."""
    if not run.steps:
        return []
    total = sum(run.steps.values())
    tokens = run.tokens.total

    def amount(done: int, planned: int, *, is_now: bool, whole_run: bool = False) -> str:
        left = run.seconds_left(whole_run=whole_run) if is_now and state == RUNNING else math.nan
        return _with_eta(f"{steps(done)}/{steps(planned)}", left)

    of_all = amount(run.run_step, total, is_now=True, whole_run=True)
    if tokens and width >= _WIDE:
        done_tokens = run.tokens.at(run.stage, run.curves(run.stage).step)
        of_all += f", {shortest_count(done_tokens)} of {shortest_count(tokens)} tokens"
    bars = [("all", run.run_step, total, of_all, "")]
    for number, (name, planned) in enumerate(run.steps.items(), 1):
        done, is_now = run.curves(name).step, name == run.stage
        label = f"{number}/{len(run.steps)} {name}"
        bars.append((label, done, planned, amount(done, planned, is_now=is_now), "bold" if is_now else ""))
    longest = max(len(text) for *_, text, _ in bars)
    room = max(5, min(width // 3, width - _LONGEST_NAME - longest - 8))
    return [Row(_progress(label, done, planned, text, room), style) for label, done, planned, text, style in bars]


def _progress(label: str, done: int, total: int, amount: str, room: int) -> str:
    full = room if done >= total else int(room * done / total)
    share_done = min(1.0, done / max(1, total))
    return f"{_cut(label, _LONGEST_NAME):<{_LONGEST_NAME}} {'━' * full}{'─' * (room - full)} {share_done:4.0%} {amount}"


def _with_eta(amount: str, seconds: float) -> str:
    return amount if math.isnan(seconds) else f"{amount}, ETA {duration(seconds)}"


def _speed(run: RunFollower) -> str:
    training = run.curves(run.stage).training
    parts = [
        f"LR {scientific(training.last('lr'))}",
        f"grad norm {significant(training.last('grad_norm'), 9)}",
        f"{rate(training.last('tokens_per_s'))} tokens/s",
        memory(run.newest.get("memory_gib") or math.nan),
    ]
    mfu = run.newest.get("mfu")
    return "   ".join(parts + ([f"MFU {share(mfu)}"] if isinstance(mfu, int | float) else []))


def _loss_rows(run: RunFollower, width: int) -> Iterator[Row]:
    """The training loss and the validation loss of each dataset over all stages, whose borders are drawn.

    A terminal that has no room for the curves shows their last values only.
    """
    if not run.steps:
        return
    room = width - _LONGEST_NAME - 22
    widths = _stage_widths(list(run.steps.values()), room)
    yield Row(
        f"{'losses, nats per token':<{_LONGEST_NAME}} {'':<{sum(widths) + len(widths)}}    now  forgetting", "dim"
    )
    training = {stage: run.curves(stage).training for stage in run.steps}
    yield Row(_curve_row("training", training, run, widths, is_validation=False))
    for dataset in run.datasets():
        curves = {stage: run.curves(stage).validations.get(dataset) for stage in run.steps}
        yield Row(_curve_row(dataset, curves, run, widths, is_validation=True))


def _curve_row(
    name: str, curves: Mapping[str, StepCurve | None], run: RunFollower, widths: Sequence[int], *, is_validation: bool
) -> str:
    means: list[float] = []
    for (stage, planned), width in zip(run.steps.items(), widths, strict=bool(widths)):
        curve = curves[stage]
        if curve is None or not curve.steps:
            means += [math.nan] * width
            continue
        values = curve.values["loss_nats_per_token"]
        part = bucket_means(curve.steps, values, last_step=planned, width=width)
        means += carried_on(part)
    line = sparkline(means)
    ends = [sum(widths[: index + 1]) for index in range(len(widths))]
    drawn = "│".join(line[end - width : end] for end, width in zip(ends, widths, strict=True))
    if is_validation:
        newest, forgetting = run.newest_validation(name)
    else:
        known = [curve.last("loss_nats_per_token") for curve in curves.values() if curve is not None and curve.steps]
        newest, forgetting = (known or [math.nan])[-1], math.nan
    change = "" if math.isnan(forgetting) else f"{forgetting:+.4f}"
    last = "" if math.isnan(newest) else loss(newest)
    return f"{_cut(name, _LONGEST_NAME):<{_LONGEST_NAME}} {drawn} {last:>7}  {change:>10}"


def _stage_widths(planned: Sequence[int], room: int) -> list[int]:
    """Columns of each stage, about proportional to its steps; empty if there is no room for all."""
    room -= len(planned) - 1
    if room < len(planned):
        return []
    rest, total = room - len(planned), max(1, sum(planned))
    ends = [round(rest * sum(planned[:index]) / total) for index in range(len(planned) + 1)]
    return [1 + ends[index + 1] - ends[index] for index in range(len(planned))]


def _checkpoint_rows(run: RunFollower, now: float) -> Iterator[Row]:
    newest = run.newest_checkpoint()
    if newest is not None:
        age = f" ({duration(now - newest['time'])} ago)" if isinstance(newest.get("time"), int | float) else ""
        yield Row(f"newest checkpoint: {newest['stage']}/{step_name(newest['step'])}{age}")


def _event_rows(run: RunFollower, width: int) -> Iterator[Row]:
    for event in run.events:
        if event["name"] not in _HIDDEN_EVENTS:
            when = event.get("time")
            clock = time.strftime("%m-%d %H:%M:%S", time.localtime(when)) if isinstance(when, int | float) else ""
            text, is_bad = describe_event(event)
            yield Row(_cut(f"{clock:<14}  {text}", width), "yellow" if is_bad else "")


def describe_event(event: Mapping[str, Any]) -> tuple[str, bool]:
    """An event in words, and whether it is a problem."""
    place = f"step {event.get('step', '?')} of {event.get('stage', '?')}"
    words: dict[str, tuple[str, bool]] = {
        "start": (f"started; ranks: {event.get('world_size', '?')}", False),
        "transition": (f"stage {event.get('stage', '?')} begins, weights {event.get('weights', '?')}", False),
        "warm_up": (
            f"optimizer of {event.get('stage', '?')} warmed up by {event.get('passes', '?')} passes",
            False,
        ),
        "resume": (f"resumed after {place}", False),
        "skip_batch": (f"batch skipped at {place}: {event.get('why', '?')}", True),
        "loss_spike": (f"loss spike at {place}: {event.get('z_score', math.nan):.1f} standard deviations", True),
        "upload_failed": (str(event.get("why", "?")), True),
        "metric_failed": (f"metric {event.get('metric', '?')} failed after {place}: {event.get('why', '?')}", True),
        "save_failed": (f"checkpoint not saved: {event.get('why', '?')}", True),
        "stop": (f"stopped after {place}: {event.get('signal') or event.get('why', '?')}", "why" in event),
        "anneal": (f"annealing begins after {place}", False),
        "evaluation": (f"{event.get('suite', '?')} after {place}{_whose(event)}", False),
        "validation_changed": (f"validation data changed: {', '.join(map(str, event.get('datasets', ())))}", False),
        "settings_changed": (f"settings changed: {', '.join(map(str, event.get('settings', ())))}", False),
        "tensorboard_lost": (f"TensorBoard stopped: {event.get('why', '?')}", True),
    }
    return words.get(event["name"], (str(event["name"]), False))


def _whose(event: Mapping[str, Any]) -> str:
    """Which weights a benchmark scored, if not those that training continues with."""
    return " (average)" if event.get("weights") == AVERAGE else ""


def _seconds_since_last_line(run: RunFollower, now: float) -> float:
    written = run.last_write_s
    return math.nan if written is None else max(0.0, now - written)


def _position(run: RunFollower) -> int:
    return list(run.steps).index(run.stage) if run.stage else 0


def _around(rows: Sequence[Row], most: int, center: int) -> list[Row]:
    """At most this many rows, around the one at `center`; the last line counts the others."""
    if len(rows) <= most:
        return list(rows)
    shown = max(1, most - 1)
    first = max(0, min(center - shown // 2, len(rows) - shown))
    return [*rows[first : first + shown], Row(f"  and {len(rows) - shown} other stages")][:most]


def _first(rows: Sequence[Row], most: int) -> list[Row]:
    if len(rows) <= most:
        return list(rows)
    return [*rows[: most - 1], Row(f"  and {len(rows) - most + 1} more datasets")]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 2]}.."
