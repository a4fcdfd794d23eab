"""The figures of a report as matplotlib figures: panels of curves over tokens, and forgetting over adaptation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from matplotlib import pyplot
from matplotlib.patches import Rectangle

from titan_cpt.reporting.comparison import ComparisonRow
from titan_cpt.reporting.curves import Curve, CurveGroup, curve_groups, curves_with_averages, measured_labels
from titan_cpt.reporting.figures import WIDE, Form, LegendEntry, faint, look, marker
from titan_cpt.reporting.run_log import RunLog
from titan_cpt.reporting.stage_strip import mark_stages, panel_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_SHOWN_FROM = 0.03  # the y range ignores this first part, where the loss falls from log(vocab_size)
_OF_AVERAGE = {"linestyle": (0, (1.5, 1.0)), "linewidth": 1.3}
_MOST_DOTS = 60  # a curve of few measurements has a dot at each


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        raw: thin curves behind the others: the values that were smoothed.
        dots: mark each point of a curve with few of them.
        fits_all: the y range covers all points; otherwise those after the first 3 % of the tokens.
        from_zero: the y axis begins at 0. scientific: its ticks are written as powers of ten.
        zero_line: draw a line at 0.
    """

    title: str
    y_label: str
    curves: Sequence[Curve]
    raw: Sequence[Curve] = field(default_factory=list)
    dots: bool = False
    fits_all: bool = True
    from_zero: bool = False
    scientific: bool = False
    zero_line: bool = False


def curve_legend(groups: Sequence[CurveGroup]) -> list[LegendEntry]:
    """One entry for each curve."""
    looks = [look(number) for number in range(len(groups))]
    return [
        LegendEntry(group.name, each["color"], each["linestyle"], band=len(group.runs) > 1)
        for group, each in zip(groups, looks, strict=True)
    ]


def loss_panels(groups: Sequence[CurveGroup]) -> list[Panel]:
    """Validation loss: one panel for each dataset, with the losses of the weights and of their average."""
    runs = [run for group in groups for run in group.runs]
    label = "validation loss, nats per token"
    return [
        Panel(f"loss on {name}", label, curves_with_averages(groups, name), dots=True, fits_all=False)
        for name in measured_labels(runs)
    ]


def plot_losses(runs: Sequence[RunLog], form: Form = WIDE) -> Canvas:
    """Validation loss over tokens trained on: one panel per dataset, one line per run or configuration."""
    groups = curve_groups(runs)
    return plot_panels(loss_panels(groups), groups, form)


def plot_panels(panels: Sequence[Panel], groups: Sequence[CurveGroup], form: Form = WIDE) -> Canvas:
    """Panels of curves over tokens."""
    columns = min(form.columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (form.width, rows * form.row_height)
    canvas, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    canvas.get_layout_engine().set(h_pad=0.1, w_pad=0.08)
    last = max((curve.tokens[-1] for panel in panels for curve in panel.curves if curve.tokens), default=0.0)
    name, unit = _unit(last)
    for axes, panel in zip(grid.flat, panels, strict=False):
        axes.set_xlim(-0.01 * last / unit, 1.01 * last / unit or 1.0)
        for curve in panel.raw:
            axes.plot(
                [t / unit for t in curve.tokens], curve.values, color=look(curve.number)["color"], alpha=0.25, lw=1
            )
        for curve in panel.curves:
            _draw_curve(axes, curve, unit, dots=panel.dots and len(panel.curves) <= 8)
        own = [curve for curve in panel.curves if not curve.is_average]
        strip = mark_stages(axes, groups, own, unit, panel_points(form, columns))
        cut_off = _set_y_range(axes, panel, last, unit, strip)
        axes.set_title(panel.title)
        axes.set_xlabel(f"tokens trained on ({name}){cut_off}")
        axes.set_ylabel(panel.y_label)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    return cast("Canvas", canvas)


def _draw_curve(axes: Axes, curve: Curve, unit: float, *, dots: bool) -> None:
    tokens = [t / unit for t in curve.tokens]
    style = look(curve.number) | (_OF_AVERAGE if curve.is_average else {})
    with_dots: dict[str, Any] = {"marker": "o", "markersize": 3} if dots and len(tokens) <= _MOST_DOTS else {}
    for first, end in pairwise([0, *curve.breaks, len(tokens)]):
        axes.plot(tokens[first:end], curve.values[first:end], **style, **with_dots)
        if first:  # the validation data changed: the curve is broken here
            axes.axvline(tokens[first], color=style["color"], linestyle=":", linewidth=1, zorder=1)
        if curve.low[first:end] != curve.high[first:end]:
            bounds = curve.low[first:end], curve.high[first:end]
            axes.fill_between(tokens[first:end], *bounds, color=style["color"], alpha=0.2, linewidth=0)


def _set_y_range(axes: Axes, panel: Panel, last: float, unit: float, strip: float) -> str:
    """Set the y range so that all curves end below the strip of stage names.

    Points above the range get a triangle at the top.

    Returns:
        A note for the x label if there are such points.
    """
    points = [
        (t, value, curve.number)
        for curve in panel.curves
        for t, middle, *band in zip(curve.tokens, curve.values, curve.low, curve.high, strict=True)
        for value in (middle, *band)
        if math.isfinite(value)
    ]
    shown = [value for t, value, _ in points if panel.fits_all or t >= _SHOWN_FROM * last]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    if panel.from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) + (1e-3 if high == low or not panel.from_zero else 0)
    low, high = low if panel.from_zero and low == 0 else low - margin, high + margin
    top = low + (high - low) / (1 - strip)
    axes.set_ylim(low, top)
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= high])
    if panel.scientific:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if panel.zero_line and low < 0 < high:
        axes.axhline(0, color=faint(), linewidth=1, zorder=1)
    for artist in [*axes.lines, *axes.collections]:
        if strip and artist.get_transform() == axes.transData:
            artist.set_clip_path(Rectangle((0, 0), 1, 1 - strip, transform=axes.transAxes))
    above = [(t, value, number) for t, value, number in points if value > high]
    below = [value for _, value, _ in points if value < low]
    for t, _, number in {(t, 0.0, number) for t, _, number in above}:
        axes.plot(
            t / unit,
            1 - strip,
            transform=axes.get_xaxis_transform(),
            color=look(number)["color"],
            marker="^",
            markersize=5,
            clip_on=False,
            zorder=5,
        )
    notes = [f"▲ up to {max(value for _, value, _ in above):.4g}"] if above else []
    notes += [f"▼ down to {min(below):.4g}"] if below else []
    return "".join(f"; {note}" for note in notes)


def trade_off_legend(points: Sequence[tuple[int, ComparisonRow, float]]) -> list[LegendEntry]:
    """One entry for each different look of the points."""
    entries = {
        number: LegendEntry(row.name, look(number)["color"], marker=marker(number), hollow=not row.forgetting)
        for number, row, _ in reversed(points)
    }
    return [entries[number] for number in sorted(entries)]


def plot_trade_off(points: Sequence[tuple[int, ComparisonRow, float]], form: Form = WIDE) -> Canvas:
    """Forgetting over adaptation, one point per run; lower left is better.

    Args:
        points: (number of the run's curve, its row, forgetting). A run whose row has no forgetting, because it was
            trained from scratch, gets a hollow point.
    """
    canvas, axes = pyplot.subplots(figsize=(form.width, form.row_height + 0.4), layout="constrained")
    for number, row, value in points:
        color = look(number)["color"]
        inside = color if row.forgetting else "none"
        style = {"color": color, "marker": marker(number), "markersize": 7.5, "markerfacecolor": inside}
        axes.plot(row.adaptation or 0.0, value, linestyle="none", **style)
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel("adaptation: validation loss on new data, nats per token")
    axes.set_ylabel("forgetting, nats per token")
    return cast("Canvas", canvas)


def _unit(most: float) -> tuple[str, float]:
    return next((pair for pair in (("B", 1e9), ("M", 1e6)) if most >= pair[1]), ("thousand", 1e3))
