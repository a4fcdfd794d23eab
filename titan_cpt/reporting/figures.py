"""The figures of a report: losses over tokens, learning rates, forgetting over adaptation, throughput.

Each figure is drawn twice, for light and for dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import matplotlib

from titan_cpt.reporting.comparison import ComparisonRow
from titan_cpt.reporting.run_log import RunLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

matplotlib.use("Agg")  # works without a display; must come before the import of pyplot
from matplotlib import pyplot

# The palette of Okabe and Ito, which is safe for color-blind readers, without its yellow, which is too pale on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "v")
_MAX_POINTS = 500
_MAX_IN_LEGEND = 16
_THEMES = {"light": ("#1b1f24", "#8c959f", "#e6e8eb"), "dark": ("#e6edf3", "#8b949e", "#2b3138")}
PNG_MARK = "titan_cpt report"  # in a PNG's metadata: marks figures that a report wrote


@dataclass(frozen=True)
class Figure:
    """A rendered figure: file name without suffix, caption, width in inches, and the picture as PNG and SVG."""

    name: str
    caption: str
    width: float
    png: bytes
    svg_light: str
    svg_dark: str


def render_figure(name: str, caption: str, plot: Callable[[], Canvas]) -> Figure:
    """Call `plot` under the light and the dark theme and render its result as PNG and SVG."""
    with _theme("light"):
        canvas = plot()
        width = float(canvas.get_figwidth())
        png = _rendered(canvas, "png")
        light = _rendered(canvas, "svg").decode()
    with _theme("dark"):
        dark = _rendered(plot(), "svg").decode()
    return Figure(name, caption, width, png, light, dark)


@contextmanager
def _theme(name: str) -> Iterator[None]:
    ink, faint, grid = _THEMES[name]
    settings: dict[str, Any] = {
        "figure.facecolor": "none" if name == "dark" else "white",
        "axes.facecolor": "none",
        "savefig.facecolor": "none" if name == "dark" else "white",
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
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9.5,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "font.family": "sans-serif",
        "svg.hashsalt": "titan_cpt",  # the same numbers give the same bytes
    }
    with matplotlib.rc_context(settings):
        yield


def _rendered(canvas: Canvas, form: str) -> bytes:
    out = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {"Software": PNG_MARK}
    canvas.savefig(out, format=form, dpi=180, bbox_inches="tight", metadata=metadata)
    pyplot.close(canvas)
    return out.getvalue()


def plot_losses(runs: Sequence[RunLog]) -> Canvas:
    """Validation loss over tokens trained on: one panel per dataset, one line per run."""
    datasets = sorted({line["dataset"] for run in runs for line in run.validations})
    columns = min(2, len(datasets))
    rows = -(-len(datasets) // columns)
    canvas, panels = pyplot.subplots(rows, columns, figsize=(10.4, 3.5 * rows), squeeze=False)
    unit, size = _unit(runs)
    for axes, dataset in zip(panels.flat, datasets, strict=False):
        shown: list[float] = []
        last = max(run.total_tokens for run in runs)
        for number, run in enumerate(runs):
            known = [line for line in run.validations if line["loss_nats_per_token"] is not None]
            lines = [line for line in known if line["dataset"] == dataset]
            tokens = [run.tokens_at(line["stage"], line["step"]) for line in lines]
            losses = [line["loss_nats_per_token"] for line in lines]
            for first, end in _comparable_ranges(run, lines):
                label = run.name if first == 0 else None
                axes.plot([t / size for t in tokens[first:end]], losses[first:end], **_look(number), label=label)
                if first:  # the validation data changed: the curve is broken here
                    axes.axvline(tokens[first] / size, **_look(number) | {"linestyle": ":"}, linewidth=1, zorder=1)
            shown += [loss for t, loss in zip(tokens, losses, strict=True) if t >= 0.03 * last]
        _mark_stages(axes, runs, size)
        if shown:  # without the first 3 %: the loss falls from log(vocab_size) and would flatten the rest
            low, high = min(shown), max(shown)
            axes.set_ylim(low - 0.06 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
        axes.set_title(f"loss on {dataset}", pad=18)  # above the stages' names
        axes.set_xlabel(f"tokens trained on ({unit})")
        axes.set_ylabel("validation loss, nats per token")
    for axes in list(panels.flat)[len(datasets) :]:
        axes.set_axis_off()
    return _with_legend(canvas, panels[0, 0], len(runs))


def _comparable_ranges(run: RunLog, lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Index ranges [first, end) of consecutive validation lines that are comparable with each other."""
    changes = [index for index in range(1, len(lines)) if not run.comparable(lines[index - 1], lines[index])]
    return list(pairwise([0, *changes, len(lines)]))


def plot_learning_rates(runs: Sequence[RunLog]) -> Canvas:
    """Learning rate over tokens, one line per run."""
    return _over_tokens(runs, "lr", "learning rate", scientific=True)


def plot_throughput(runs: Sequence[RunLog]) -> Canvas:
    """Training throughput over tokens, without the time of validation and checkpoints."""
    return _over_tokens(runs, "tokens_per_s", "tokens per second", scientific=False)


def _over_tokens(runs: Sequence[RunLog], key: str, label: str, *, scientific: bool) -> Canvas:
    canvas, axes = pyplot.subplots(figsize=(10.4, 3.1))
    unit, size = _unit(runs)
    for number, run in enumerate(runs):
        lines = [line for line in run.trains if line.get(key) is not None]
        shown = lines[:: max(1, len(lines) // _MAX_POINTS)] + lines[-1:]
        tokens = [run.tokens_at(line["stage"], line["step"]) / size for line in shown]
        axes.plot(tokens, [line[key] for line in shown], **_look(number), label=run.name)
    _mark_stages(axes, runs, size)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"tokens trained on ({unit})")
    axes.set_ylabel(label)
    if scientific:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return _with_legend(canvas, axes, len(runs))


def plot_trade_off(points: Sequence[tuple[int, ComparisonRow, float]]) -> Canvas:
    """Forgetting over adaptation, one point per run; lower left is better.

    Args:
        points: (index of the run, its row, forgetting). A run whose row has no forgetting, because it was trained from
            scratch, gets a hollow point.
    """
    canvas, axes = pyplot.subplots(figsize=(8.2, 3.9))
    for number, row, value in points:
        inside = "auto" if row.forgetting else "none"
        look = {"color": _look(number)["color"], "marker": _per_cycle(_MARKERS, number), "label": row.name}
        axes.plot(row.adaptation or 0.0, value, linestyle="none", markersize=7.5, markerfacecolor=inside, **look)
    axes.margins(x=0.08, y=0.1)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))  # names beside the points would overlap
    axes.set_xlabel("adaptation: validation loss on the new data, nats per token")
    axes.set_ylabel("forgetting: increase of the loss on the old data")
    return cast("Canvas", canvas)


def _look(number: int) -> dict[str, Any]:
    return {"color": _COLORS[number % len(_COLORS)], "linestyle": _per_cycle(_STYLES, number)}


def _per_cycle(styles: Sequence[str], number: int) -> str:
    """The style of a run: the next one each time the colors have been used up."""
    return styles[number // len(_COLORS) % len(styles)]


def _unit(runs: Sequence[RunLog]) -> tuple[str, float]:
    most = max(run.total_tokens for run in runs)
    return next((pair for pair in (("B", 1e9), ("M", 1e6)) if most >= pair[1]), ("thousand", 1e3))


def _mark_stages(axes: Axes, runs: Sequence[RunLog], size: float) -> None:
    """Dashed lines between the stages of the run that has the most, and the stages' names above them."""
    run = max(runs, key=lambda run: len(run.plan["stages"]))
    stages = [stage["name"] for stage in run.plan["stages"]]
    if len(stages) < 2:
        return
    for index, name in enumerate(stages):
        begin = run.tokens_at(name, 0) / size
        if index:
            axes.axvline(begin, color=matplotlib.rcParams["xtick.color"], linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        color = matplotlib.rcParams["xtick.color"]
        where = axes.get_xaxis_transform()
        axes.annotate(
            f"stage {name}",
            (begin, 1.0),
            (4, 3),  # above the panel, where no curve is
            xycoords=where,
            textcoords="offset points",
            va="bottom",
            fontsize=8,
            color=color,
        )


def _with_legend(canvas: Canvas, axes: Axes, count: int) -> Canvas:
    canvas.tight_layout()
    if 1 < count <= _MAX_IN_LEGEND:
        handles, labels = axes.get_legend_handles_labels()
        canvas.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(5, count))
    return canvas
