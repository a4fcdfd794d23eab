"""Rendering of the report's figures: colors, light and dark theme, a wide form and a narrow one for phones.

SVG files have no legend, because the page shows it as text that wraps; PNG files, which are used elsewhere, have one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

matplotlib.use("Agg")  # works without a display; must come before the import of pyplot
from matplotlib import pyplot
from matplotlib.lines import Line2D

# Seven colors of Okabe and Ito, which are safe for color-blind readers, without the yellow, which is too pale on white;
# then three more, for many runs.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#9467BD", "#A6761D", "#E7298A")
_STYLES = ("-", "--", "-.", ":")
_DASHES = {"-": "", "--": "7 3", "-.": "8 2.5 1.5 2.5", ":": "1.5 2.5"}  # of the same styles in the page's legend
_MARKERS = ("o", "s", "^", "v")
_LIGHT = ("#1b1f24", "#8c959f", "#e6e8eb")  # ink, faint, grid
_DARK = ("#e6edf3", "#8b949e", "#2b3138")
_COORDINATES = re.compile(r' (?:d|x|y)="[^"]*"')
_LONG_NUMBER = re.compile(r"(\d\.\d\d)\d+")  # digits far below a pixel, which are half of a file
PNG_MARK = "titan_cpt report"  # in a PNG's metadata: marks figures that a report wrote


@dataclass(frozen=True)
class Form:
    """The shape of a figure: width in inches, panels side by side, font size in points."""

    width: float
    columns: int
    font: float

    @property
    def row_height(self) -> float:
        """Height of a panel with its title and axis label, in inches."""
        return 3.3 if self.columns > 1 else 2.9


WIDE = Form(9.4, 2, 9.5)
NARROW = Form(4.0, 1, 8.5)


@dataclass(frozen=True)
class LegendEntry:
    """The name and look of a curve or point: `marker` is empty for a curve, `dashes` is an SVG dash array."""

    label: str
    color: str
    style: str = "-"
    marker: str = ""
    hollow: bool = False
    band: bool = False

    @property
    def dashes(self) -> str:
        """The line style as an SVG dash array."""
        return _DASHES[self.style]

    @property
    def symbol(self) -> str:
        """The marker as a character."""
        return dict(zip(_MARKERS, "○□△▽" if self.hollow else "●■▲▼", strict=True)).get(self.marker, "")


@dataclass(frozen=True)
class Figure:
    """A rendered figure: file name without suffix, caption, and the picture as PNG and SVG."""

    name: str
    caption: str
    legend: Sequence[LegendEntry]
    png: bytes
    svg_light: str
    svg_dark: str
    narrow_light: str
    narrow_dark: str


def render_figure(
    name: str, caption: str, plot: Callable[[Form], Canvas], legend: Sequence[LegendEntry] = ()
) -> Figure:
    """Render the result of `plot` as PNG, as SVG for light and dark pages, and as SVG for narrow ones."""
    with _theme(WIDE):
        canvas = plot(WIDE)
        wide = _svg(canvas)
        _add_legend(canvas, legend)
        png = _png(canvas)
    with _theme(NARROW):
        narrow = _svg(plot(NARROW))
    return Figure(name, caption, legend, png, wide, _darkened(wide), narrow, _darkened(narrow))


def look(number: int) -> dict[str, Any]:
    """Color and line style of a curve; all of the first 40 differ."""
    return {"color": _COLORS[number % len(_COLORS)], "linestyle": _per_cycle(_STYLES, number)}


def marker(number: int) -> str:
    """Marker of a run's point."""
    return _per_cycle(_MARKERS, number)


def _per_cycle(styles: Sequence[str], number: int) -> str:
    """The style of a run: the next one each time the colors have been used up."""
    return styles[number // len(_COLORS) % len(styles)]


def faint() -> str:
    """The color of axes and of borders between stages."""
    return str(matplotlib.rcParams["xtick.color"])


@contextmanager
def _theme(form: Form) -> Iterator[None]:
    ink, faint, grid = _LIGHT
    settings: dict[str, Any] = {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "xtick.color": faint,
        "ytick.color": faint,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "axes.edgecolor": faint,
        "axes.grid": True,
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": form.font + 1.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": form.font,
        "xtick.labelsize": form.font - 0.5,
        "ytick.labelsize": form.font - 0.5,
        "legend.fontsize": form.font - 0.5,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "font.family": "sans-serif",
        "svg.fonttype": "none",  # text stays text: smaller than outlines, and in the reader's font
        "svg.hashsalt": "titan_cpt",  # the same numbers give the same bytes
    }
    with matplotlib.rc_context(settings):
        yield


def _svg(canvas: Canvas) -> str:
    out = io.BytesIO()
    canvas.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(canvas)
    return _COORDINATES.sub(lambda found: _LONG_NUMBER.sub(r"\1", found[0]), out.getvalue().decode())


def _png(canvas: Canvas) -> bytes:
    out = io.BytesIO()
    canvas.savefig(out, format="png", dpi=180, bbox_inches="tight", facecolor="white", metadata={"Software": PNG_MARK})
    pyplot.close(canvas)
    return out.getvalue()


def _darkened(svg: str) -> str:
    """The figure in the colors of a dark page; those of the curves stay."""
    for light, dark in zip(_LIGHT, _DARK, strict=True):
        svg = svg.replace(light, dark)
    return svg


def _add_legend(canvas: Canvas, legend: Sequence[LegendEntry]) -> None:
    """A legend below the panels."""
    if not legend:
        return
    handles = [
        Line2D(
            [],
            [],
            color=entry.color,
            linestyle="none" if entry.marker else entry.style,
            marker=entry.marker or None,
            markerfacecolor="none" if entry.hollow else entry.color,
        )
        for entry in legend
    ]
    longest = max(len(entry.label) for entry in legend)
    columns = max(1, min(5, len(legend), 110 // (longest + 6)))
    labels = [entry.label for entry in legend]
    canvas.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns)
