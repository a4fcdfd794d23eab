"""The figures of a report: losses over tokens, learning rates, forgetting against adaptation, throughput.

Each is drawn twice, on white for paper and light screens and on black for dark ones, from the same numbers.
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

matplotlib.use("Agg")  # no screen is asked for
from matplotlib import pyplot  # after the choice of what it draws with

# Okabe and Ito's colours, which differ for every kind of colour vision; yellow, too pale on white, is left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "v")
_MOST_POINTS = 500
_MOST_IN_LEGEND = 16
_THEMES = {"light": ("#1b1f24", "#8c959f", "#e6e8eb"), "dark": ("#e6edf3", "#8b949e", "#2b3138")}
PNG_MARK = "titan_cpt report"  # in a PNG's metadata, by which a figure of ours is recognized


@dataclass(frozen=True)
class Figure:
    """One drawing: what it shows, how wide it is in inches, its bytes as PNG and as SVG for light and dark pages."""

    name: str
    caption: str
    width: float
    png: bytes
    svg_light: str
    svg_dark: str


def render_figure(name: str, caption: str, paint: Callable[[], Canvas]) -> Figure:
    """What `paint` draws, as PNG and SVG."""
    with _theme("light"):
        canvas = paint()
        width = float(canvas.get_figwidth())
        png = _saved(canvas, "png")
        light = _saved(canvas, "svg").decode()
    with _theme("dark"):
        dark = _saved(paint(), "svg").decode()
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


def _saved(canvas: Canvas, form: str) -> bytes:
    out = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {"Software": PNG_MARK}
    canvas.savefig(out, format=form, dpi=180, bbox_inches="tight", metadata=metadata)
    pyplot.close(canvas)
    return out.getvalue()


def plot_losses(records: Sequence[RunLog]) -> Canvas:
    """A panel for each dataset: its held-out loss over the tokens trained on, a line for each run."""
    datasets = sorted({line["dataset"] for record in records for line in record.validations})
    columns = min(2, len(datasets))
    rows = -(-len(datasets) // columns)
    canvas, panels = pyplot.subplots(rows, columns, figsize=(10.4, 3.5 * rows), squeeze=False)
    unit, size = _unit(records)
    for axes, dataset in zip(panels.flat, datasets, strict=False):
        shown: list[float] = []
        last = max(record.total_tokens for record in records)
        for number, record in enumerate(records):
            known = [line for line in record.validations if line["loss_nats_per_token"] is not None]
            mine = [line for line in known if line["dataset"] == dataset]
            tokens = [record.tokens_at(line["stage"], line["step"]) for line in mine]
            losses = [line["loss_nats_per_token"] for line in mine]
            for first, end in _alike(record, mine):
                label = record.name if first == 0 else None
                axes.plot([t / size for t in tokens[first:end]], losses[first:end], **_look(number), label=label)
                if first:  # the curve is broken there: what it measures has changed
                    axes.axvline(tokens[first] / size, **_look(number) | {"linestyle": ":"}, linewidth=1, zorder=1)
            shown += [loss for t, loss in zip(tokens, losses, strict=True) if t >= 0.03 * last]
        _mark_borders(axes, records, size)
        if shown:  # the first steps, which fall from the logarithm of the vocabulary, would flatten the rest
            low, high = min(shown), max(shown)
            axes.set_ylim(low - 0.06 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
        axes.set_title(dataset)
        axes.set_xlabel(f"tokens trained on ({unit})")
        axes.set_ylabel("loss, nats per token")
    for axes in list(panels.flat)[len(datasets) :]:
        axes.set_axis_off()
    return _with_legend(canvas, panels[0, 0], len(records))


def _alike(record: RunLog, lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """[first, end) of each stretch of a dataset's measurements that are comparable with each other."""
    changes = [place for place in range(1, len(lines)) if not record.comparable(lines[place - 1], lines[place])]
    return list(pairwise([0, *changes, len(lines)]))


def plot_learning_rates(records: Sequence[RunLog]) -> Canvas:
    """The LR that each run used, over its tokens."""
    return _over_tokens(records, "lr", "learning rate", scientific=True)


def plot_throughput(records: Sequence[RunLog]) -> Canvas:
    """Tokens per second, validation and saving left out."""
    return _over_tokens(records, "tokens_per_s", "tokens per second", scientific=False)


def _over_tokens(records: Sequence[RunLog], key: str, label: str, *, scientific: bool) -> Canvas:
    canvas, axes = pyplot.subplots(figsize=(10.4, 3.1))
    unit, size = _unit(records)
    for number, record in enumerate(records):
        lines = [line for line in record.trains if line.get(key) is not None]
        kept = lines[:: max(1, len(lines) // _MOST_POINTS)] + lines[-1:]
        tokens = [record.tokens_at(line["stage"], line["step"]) / size for line in kept]
        axes.plot(tokens, [line[key] for line in kept], **_look(number), label=record.name)
    _mark_borders(axes, records, size)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"tokens trained on ({unit})")
    axes.set_ylabel(label)
    if scientific:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return _with_legend(canvas, axes, len(records))


def plot_trade_off(points: Sequence[tuple[int, ComparisonRow, float]]) -> Canvas:
    """Forgetting against adaptation, (number of the run, its row, forgetting) for each; better to the lower left.

    A run that forgets nothing of its own, because it was trained from scratch, is drawn hollow.
    """
    canvas, axes = pyplot.subplots(figsize=(8.2, 3.9))
    for number, row, value in points:
        inside = "auto" if row.forgetting else "none"
        look = {"color": _look(number)["color"], "marker": _of_round(_MARKERS, number), "label": row.name}
        axes.plot(row.adaptation or 0.0, value, linestyle="none", markersize=7.5, markerfacecolor=inside, **look)
    axes.margins(x=0.08, y=0.1)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))  # names beside the points would cover each other
    axes.set_xlabel("adaptation: loss on the new data, nats per token")
    axes.set_ylabel("forgetting: rise of the loss on the old data")
    return cast("Canvas", canvas)


def _look(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _of_round(_STYLES, number)}


def _of_round(ways: Sequence[str], number: int) -> str:
    """Another way of drawing for each round through the colours."""
    return ways[number // len(_COLOURS) % len(ways)]


def _unit(records: Sequence[RunLog]) -> tuple[str, float]:
    most = max(record.total_tokens for record in records)
    return next((pair for pair in (("B", 1e9), ("M", 1e6)) if most >= pair[1]), ("thousand", 1e3))


def _mark_borders(axes: Axes, records: Sequence[RunLog], size: float) -> None:
    """Dashed lines where the stages of the run with the most of them end, and the stages' names."""
    record = max(records, key=lambda record: len(record.plan["stages"]))
    stages = [stage["name"] for stage in record.plan["stages"]]
    if len(stages) < 2:
        return
    for place, name in enumerate(stages):
        begin = record.tokens_at(name, 0) / size
        if place:
            axes.axvline(begin, color=matplotlib.rcParams["xtick.color"], linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        colour = matplotlib.rcParams["xtick.color"]
        where = axes.get_xaxis_transform()
        axes.annotate(
            name, (begin, 1.0), (4, -3), xycoords=where, textcoords="offset points", va="top", fontsize=8, color=colour
        )


def _with_legend(canvas: Canvas, axes: Axes, count: int) -> Canvas:
    canvas.tight_layout()
    if 1 < count <= _MOST_IN_LEGEND:
        handles, labels = axes.get_legend_handles_labels()
        canvas.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(5, count))
    return canvas
