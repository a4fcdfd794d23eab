"""Sections of the HTML report with curves over tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from titan_cpt.reporting.curves import (
    CurveGroup,
    curve_groups,
    curves_of_source,
    curves_with_averages,
    measured_labels,
    replay_curves,
    trained_sources,
    training_curves,
)
from titan_cpt.reporting.html_parts import Section
from titan_cpt.reporting.run_log import RunLog

if TYPE_CHECKING:
    from titan_cpt.reporting.figures import Figure
    from titan_cpt.reporting.plots import Panel

_MOST_SOURCES = 12
_RAW_SHOWN = 3  # of more curves, the values that were smoothed would cover each other


def loss_curves_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Validation loss of each dataset over tokens."""
    if any(run.validations for run in runs):
        from titan_cpt.reporting.plots import loss_panels

        groups = curve_groups(runs)
        panels = loss_panels(groups)
        caption = "Validation loss of each dataset over the tokens trained on."
        if any(curve.breaks for panel in panels for curve in panel.curves):
            caption += (
                " Dotted lines: the dataset's validation data or windows changed; losses on the two sides are not "
                "comparable."
            )
        caption += _about_averages(panels)
        caption += " ▲: a point above the y range, which ignores the first 3 % of the tokens."
        yield Section("Validation losses", figures=[_figure("losses", caption, panels, groups)])


def forgetting_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Forgetting of each dataset over tokens."""
    key = "forgetting_nats_per_token"
    datasets = measured_labels(runs, key)
    if datasets:
        from titan_cpt.reporting.plots import Panel

        groups = curve_groups(runs)
        panels = [
            Panel(
                f"forgetting of {name}",
                "nats per token",
                curves_with_averages(groups, name, key),
                dots=True,
                zero_line=True,
            )
            for name in datasets
        ]
        caption = (
            "Forgetting over the tokens trained on: validation loss minus the loss when training on the dataset last "
            "ended. Above 0 the dataset is forgotten."
        ) + _about_averages(panels)
        yield Section("Forgetting over time", figures=[_figure("forgetting", caption, panels, groups)])


def _about_averages(panels: Sequence[Panel]) -> str:
    found = any(curve.is_average for panel in panels for curve in panel.curves)
    return " Short dashes: the average of the weights, in the color of its run." if found else ""


def training_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Training loss and gradient norm, smoothed."""
    from titan_cpt.reporting.plots import Panel

    groups = curve_groups(runs)
    panels = []
    for key, title, label in (
        ("loss_nats_per_token", "training loss", "nats per token"),
        ("grad_norm", "gradient norm", "norm before clipping"),
    ):
        curves = training_curves(groups, key, smooth=True)
        raw = training_curves(groups, key) if len(groups) <= _RAW_SHOWN else []
        panels.append(Panel(title, label, curves, raw=raw, fits_all=False))
    if any(curve.tokens for panel in panels for curve in panel.curves):
        caption = "Training loss and gradient norm: means over up to 1/40 of the recorded steps."
        caption += " Thin: each step." if len(groups) <= _RAW_SHOWN else ""
        caption += " ▲: a point above the y range, which ignores the first 3 % of the tokens."
        yield Section("Training loss", figures=[_figure("training", caption, panels, groups)])


def sources_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Training loss of every source of the mixture, if there are several; replay has panels of its own."""
    from titan_cpt.reporting.plots import Panel

    sources = trained_sources(runs)
    if len(sources) < 2:
        return
    groups = curve_groups(runs)
    panels = []
    for key, name in sources[:_MOST_SOURCES]:
        title = f"replay of {name}" if key.startswith("replay") else name
        panels.append(Panel(title, "nats per token", curves_of_source(groups, key, name), fits_all=False))
    caption = "Training loss of each source, smoothed as above."
    if len(sources) > _MOST_SOURCES:
        caption += f" {len(sources) - _MOST_SOURCES} further sources are in metrics.jsonl and TensorBoard."
    yield Section("Training loss by source", figures=[_figure("sources", caption, panels, groups)])


def schedules_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Learning rate and share of replay over tokens."""
    from titan_cpt.reporting.plots import Panel

    groups = curve_groups(runs)
    rates = training_curves(groups, "lr")
    replay = replay_curves(groups)
    if not any(curve.tokens for curve in rates):
        return
    panels = [Panel("learning rate", "learning rate", rates, from_zero=True, scientific=True)]
    caption = "Learning rate of each training step."
    if any(any(curve.values) for curve in replay):
        panels.append(Panel("replay", "% of the step's tokens", replay, from_zero=True))
        caption = (
            "Learning rate, and tokens replayed from earlier datasets in percent of each step's tokens (smoothed; "
            "planned, where some steps are not recorded)."
        )
    yield Section("Learning rate and replay", figures=[_figure("learning-rates", caption, panels, groups)])


def throughput_figure(runs: Sequence[RunLog]) -> Figure:
    """Tokens per second over tokens."""
    from titan_cpt.reporting.plots import Panel

    groups = curve_groups(runs)
    panels = [Panel("throughput", "tokens per second", training_curves(groups, "tokens_per_s"), from_zero=True)]
    caption = "Training throughput of all devices, without the time of validation and checkpoints."
    return _figure("throughput", caption, panels, groups)


def _figure(name: str, caption: str, panels: Sequence[Panel], groups: Sequence[CurveGroup]) -> Figure:
    from titan_cpt.reporting.figures import render_figure
    from titan_cpt.reporting.plots import curve_legend, plot_panels
    from titan_cpt.reporting.stage_strip import stage_caption

    grouped = any(len(group.runs) > 1 for group in groups)
    caption += stage_caption(groups)
    caption += " Bands: from the lowest to the highest seed of a configuration; lines: their mean." if grouped else ""
    return render_figure(name, caption, partial(plot_panels, panels, groups), curve_legend(groups))
