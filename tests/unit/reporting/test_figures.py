"""Rendering of figures: light and dark, wide and narrow."""

import re

from titan_cpt.reporting.figures import render_figure
from titan_cpt.reporting.plots import plot_losses
from titan_cpt.reporting.run_log import read_run
from unit.reporting.run_folders import EN_DE


def test_a_dark_figure_differs_in_the_colors_of_text_and_axes_only(write_run):
    """Same coordinates, same curves; the narrow form is less than half as wide."""
    run = read_run(write_run("r", EN_DE))
    figure = render_figure("losses", "", lambda form: plot_losses([run], form))
    without_colors = [re.sub(r"#[0-9a-f]{6}", "", svg) for svg in (figure.svg_light, figure.svg_dark)]
    wide, narrow = (float(re.search(r'width="([\d.]+)pt"', svg)[1]) for svg in (figure.svg_light, figure.narrow_light))

    assert without_colors[0] == without_colors[1]
    assert "#1b1f24" in figure.svg_light
    assert "#1b1f24" not in figure.svg_dark
    assert narrow < wide / 2


def test_a_figure_keeps_all_digits_of_its_tick_labels(write_run):
    """Coordinates are shortened to hundredths of a point; the labels 3.125 and 3.375 are not."""
    run = read_run(write_run("r", EN_DE))

    def plot(form):
        canvas = plot_losses([run], form)
        canvas.axes[0].set_yticks([3.125, 3.375])
        canvas.axes[0].set_yticklabels(["3.125", "3.375"])
        return canvas

    svg = render_figure("losses", "", plot).svg_light

    assert "3.125" in svg
    assert "3.375" in svg
    assert not re.findall(r' d="[^"]*\d\.\d{3}', svg)
