"""The names of the stages in a strip at the top of a panel, above all curves, and the borders between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.patches import Rectangle

from titan_cpt.reporting.curves import Curve, CurveGroup
from titan_cpt.reporting.figures import NARROW, Form, faint, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LAYOUTS = 3  # more different timetables of stages are marked on the curves only
_ROW_POINTS = 14.0
_MARGINS = (60.0, 68.0)  # points of a panel's width and height that axis labels and title take


@dataclass(frozen=True)
class StageTimetable:
    """Stage names and the tokens trained on when each begins; `groups` are the numbers of the curves that have it."""

    stages: Sequence[tuple[str, int]]
    groups: Sequence[int]


def timetables(groups: Sequence[CurveGroup]) -> list[StageTimetable]:
    """The different timetables of stages of all curves; runs of one stage have none."""
    found: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for number, group in enumerate(groups):
        run = group.runs[0]
        stages = tuple((stage["name"], run.tokens_at(stage["name"], 0)) for stage in run.plan["stages"])
        if len(stages) > 1:
            found.setdefault(stages, []).append(number)
    return [StageTimetable(stages, numbers) for stages, numbers in found.items()]


def stage_caption(groups: Sequence[CurveGroup]) -> str:
    """Sentences of a figure's caption that explain borders and names of stages."""
    tables = timetables(groups)
    if not tables:
        return ""
    if len(tables) > _MOST_LAYOUTS:
        return " Short ticks on a curve: ends of its stages, which differ between the runs."
    text = " Dashed lines: ends of stages"
    text += ", in the color of the run where they differ (gray: of several runs)." if len(tables) > 1 else "."
    last = max(_end(group) for group in groups)
    for table in tables:
        if not _names_fit(table, (0.0, float(last)), panel_points(NARROW, 1)[0]):
            names = ", ".join(f"{number} {name}" for number, (name, _) in enumerate(table.stages, 1))
            text += f" Stages by number: {names}."
    return text


def mark_stages(
    axes: Axes, groups: Sequence[CurveGroup], curves: Sequence[Curve], size: float, panel: tuple[float, float]
) -> float:
    """Draw the strip and the borders of the stages.

    Args:
        size: tokens per unit of the x axis.
        panel: width and height of the axes in points.

    Returns:
        The height of the strip as a fraction of the panel's; 0 if there is none. Curves must stay below it.
    """
    tables = timetables(groups)
    if len(tables) > _MOST_LAYOUTS:
        _mark_on_curves(axes, curves, size)
        return 0.0
    if not tables:
        return 0.0
    width, height = panel
    row = _ROW_POINTS / height
    strip = len(tables) * row
    grid = matplotlib.rcParams["grid.color"]
    axes.add_patch(Rectangle((0, 1 - strip), 1, strip, transform=axes.transAxes, color=grid, alpha=0.6, lw=0, zorder=3))
    for index, table in enumerate(tables):
        color = look(table.groups[0])["color"] if len(tables) > 1 and len(table.groups) == 1 else faint()
        _mark_table(axes, table, color, (1 - (index + 1) * row, row), (size, width))
    return strip


def _mark_table(
    axes: Axes, table: StageTimetable, color: str, band: tuple[float, float], scale: tuple[float, float]
) -> None:
    """Borders and names of one timetable; band: bottom and height in the panel; scale: tokens per unit, points."""
    size, width = scale
    low, high = axes.get_xlim()
    as_names = _names_fit(table, (low * size, high * size), width)
    for number, (name, first, end) in enumerate(_visible(table, (low * size, high * size)), 1):
        if number > 1:
            axes.axvline(first / size, 0, sum(band), color=color, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        label = name if as_names else str(number)
        if not as_names and _text_points(label) > width * (end - first) / ((high - low) * size):
            continue
        axes.annotate(
            label,
            (max(first / size, low), band[0] + band[1] / 2),
            (4, 0),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=matplotlib.rcParams["text.color"] if color == faint() else color,
            zorder=4,
            annotation_clip=True,
        )


def _mark_on_curves(axes: Axes, curves: Sequence[Curve], size: float) -> None:
    """A tick on each curve where one of its stages ends."""
    for curve in curves:
        ends = [i for i in range(len(curve.places) - 1) if curve.places[i][0] != curve.places[i + 1][0]]
        axes.plot(
            [curve.tokens[end] / size for end in ends],
            [curve.values[end] for end in ends],
            color=look(curve.number)["color"],
            linestyle="none",
            marker="|",
            markersize=11,
            markeredgewidth=1.6,
        )


def _visible(table: StageTimetable, limits: tuple[float, float]) -> list[tuple[str, float, float]]:
    """Name, first and last token of each stage that begins within the limits of the x axis."""
    ends = [begin for _, begin in table.stages[1:]] + [limits[1]]
    return [
        (name, begin, min(end, limits[1]))
        for (name, begin), end in zip(table.stages, ends, strict=True)
        if begin < limits[1]
    ]


def _names_fit(table: StageTimetable, limits: tuple[float, float], width: float) -> bool:
    per_token = width / max(limits[1] - limits[0], 1)
    return all(_text_points(name) <= (end - begin) * per_token for name, begin, end in _visible(table, limits))


def _text_points(text: str) -> float:
    """An upper estimate of a label's width, with its distance from the border."""
    return 5.0 * len(text) + 8


def panel_points(form: Form, columns: int) -> tuple[float, float]:
    """About the width and height of a panel's axes in points."""
    return 72 * form.width / columns - _MARGINS[0], 72 * form.row_height - _MARGINS[1]


def _end(group: CurveGroup) -> int:
    return max(run.tokens.total for run in group.runs)
