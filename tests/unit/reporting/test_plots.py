"""Figures of the report, checked by the lines and texts that they draw."""

import pytest

from titan_cpt.reporting.comparison import ComparisonRow
from titan_cpt.reporting.curves import curve_groups
from titan_cpt.reporting.figures import NARROW, WIDE
from titan_cpt.reporting.plots import curve_legend, loss_panels, plot_losses, plot_trade_off
from titan_cpt.reporting.run_log import read_run
from titan_cpt.reporting.stage_strip import stage_caption
from unit.reporting.run_folders import AVERAGED, EN_DE, measured, on, stage, use


def test_a_curve_is_broken_and_marked_where_the_validation_data_changed(write_run):
    """English after 10 thousand tokens: two separate lines and a dotted one between; German is one line."""
    lines = [*on("A", EN_DE[:4]), *(line for line in on("A", EN_DE[4:]) if line["dataset"] == "de")]
    lines += [line for line in on("B", EN_DE[4:]) if line["dataset"] == "en"]
    german, english = plot_losses([read_run(write_run("r", lines))]).axes[:2]

    def curves(axes):
        return [
            list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) > 1 and max(line.get_ydata()) > 1
        ]

    assert curves(english) == [[0, 10], [10, 19, 20]]
    assert curves(german) == [[0, 10, 10, 19, 20]]
    assert [line.get_linestyle() for line in english.lines].count(":") == 1
    assert ":" not in {line.get_linestyle() for line in german.lines}


def test_an_average_is_drawn_in_the_panel_and_the_color_of_its_weights(write_run):
    """Two panels, not four: each has the curve of the weights and dashed the average of the steps that have one."""
    axes = plot_losses([read_run(write_run("r", AVERAGED))]).axes
    german, english = (list(panel.lines) for panel in axes if panel.get_title())

    assert [panel.get_title() for panel in axes] == ["loss on de", "loss on en"]
    for lines, losses in ((german, [3.0, 2.8]), (english, [4.8, 4.6])):
        weights, average = (line for line in lines if len(line.get_xdata()) > 1 and max(line.get_ydata()) > 1)
        assert list(average.get_ydata()) == losses
        assert list(average.get_xdata()) == [19, 20]
        assert average.get_color() == weights.get_color()
        assert (weights.get_linestyle(), average.get_linestyle()) == ("-", "--")


def test_no_two_points_of_the_trade_off_look_alike():
    """Ten colors, four markers; a run from scratch is hollow."""
    rows = [
        ComparisonRow(f"run {n}", "s", True, {}, None, {"en": 0.1} if n else {}, 3.0 + n, 1, 1.0) for n in range(40)
    ]
    points = plot_trade_off([(number, row, 0.1) for number, row in enumerate(rows)]).axes[0].lines

    assert len({(point.get_color(), point.get_marker()) for point in points}) == 40
    assert [point.get_markerfacecolor() == "none" for point in points] == [True] + [False] * 39


def strip_of(axes):
    """The strip of stage names: its lower edge in the panel's fraction, None without a strip."""
    return axes.patches[0].get_y() if axes.patches else None


@pytest.mark.parametrize("form", [WIDE, NARROW])
def test_names_of_stages_are_inside_the_panel_and_above_all_curves(write_run, form):
    """Also in the panel of a dataset that is first measured in the second stage."""
    lines = [line for line in EN_DE if not (line["dataset"] == "de" and line["stage"] == "a")]
    canvas = plot_losses([read_run(write_run("r", lines))], form)
    canvas.canvas.draw()
    for axes in canvas.axes:
        box = axes.get_window_extent()
        names = [(text.get_text(), text.get_window_extent()) for text in axes.texts]
        assert [name for name, _ in names] == ["a", "b"]
        for _, extent in names:
            assert box.x0 <= extent.x0
            assert extent.x1 <= box.x1
            assert box.y0 + strip_of(axes) * box.height <= extent.y0
            assert extent.y1 <= box.y1
        for line in axes.lines:
            if line.get_transform() == axes.transData and len(line.get_xdata()) > 1:
                assert line.get_clip_box().y1 <= box.y0 + strip_of(axes) * box.height + 1e-6
        low, high = axes.get_ylim()
        losses = [line["loss_nats_per_token"] for line in lines if f"loss on {line['dataset']}" == axes.get_title()]
        assert min(losses) >= low
        assert sorted(losses)[-2] <= low + (high - low) * strip_of(axes)


def test_points_above_the_y_range_get_a_triangle_and_a_note(write_run):
    """English falls from 8.0, in the first 3 % of the tokens, which the range ignores."""
    german, english = plot_losses([read_run(write_run("r", EN_DE))]).axes

    assert [line.get_marker() for line in english.lines].count("^") == 1
    assert "▲ up to 8" in english.get_xlabel()
    assert "▲ up to 8.5" in german.get_xlabel()


def test_names_that_do_not_fit_are_numbers_that_the_caption_explains(write_run):
    """Twelve stages with long names."""
    stages = [stage(f"a long name {n}", 1, [f"d{n}"], n + 1, **{f"d{n}": use(1000)}) for n in range(12)]
    groups = curve_groups([read_run(write_run("r", [measured("a long name 11", 1, "d0", 3.0)], stages, begun=""))])
    (axes,) = plot_losses(groups[0].runs, NARROW).axes

    assert [text.get_text() for text in axes.texts] == [str(n) for n in range(1, 13)]
    assert "Stages by number: 1 a long name 0, 2 a long name 1," in stage_caption(groups)


def test_runs_with_other_stage_lengths_have_borders_of_their_own(write_run):
    """10 and 20 steps of the first stage: a border at 10 in one color, one at 20 in the other."""
    longer = [stage("a", 20, ["en"], 20, en=use(20_000)), stage("c", 10, ["de"], 30, de=use(10_000))]
    lines = [measured("a", 0, "en", 8.0), measured("a", 20, "en", 4.0), measured("c", 10, "en", 4.5)]
    runs = [read_run(write_run("short", EN_DE)), read_run(write_run("long", lines, longer, begun="a"))]
    english = plot_losses(runs).axes[1]
    borders = {line.get_xdata()[0]: line.get_color() for line in english.lines if line.get_linestyle() == "--"}
    colors = {entry.label: entry.color for entry in curve_legend(curve_groups(runs))}

    assert borders == {10: colors["short"], 20: colors["long"]}
    assert [text.get_text() for text in english.texts] == ["a", "b", "a", "c"]


def test_many_different_timetables_are_ticks_on_the_curves(write_run):
    """Five runs whose first stages differ: a tick at the end of each, no strip, and a sentence in the caption."""
    runs = []
    for n in range(5):
        stages = [stage("a", 10 + n, ["en"], 20, en=use(1000)), stage("b", 10, ["de"], 30, de=use(1000))]
        lines = [measured("a", 10 + n, "en", 4.0), measured("b", 10, "en", 5.0)]
        runs.append(read_run(write_run(f"r{n}", lines, stages)))
    (axes,) = plot_losses(runs).axes

    assert strip_of(axes) is None
    assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "|"] == [[10 + n] for n in range(5)]
    assert "Short ticks on a curve" in stage_caption(curve_groups(runs))


def test_seeds_of_many_runs_are_a_mean_with_a_band(write_run):
    """Three configurations with three seeds: losses 4.0, 4.5 and 5.5 at the end are a line at 14/3 from 4.0 to 5.5."""
    runs = []
    for rate in (1, 2, 3):
        for seed, loss in enumerate((4.0, 4.5, 5.5)):
            folder = write_run(f"rate-{rate}_seed-{seed}", [measured("a", 0, "en", 8.0), measured("a", 10, "en", loss)])
            folder.joinpath("config.toml").write_text(
                f'[job]\nname = "{folder.name}"\nseed = {seed}\noutput_dir = "x{seed}"\n[optimizer]\nlr = {rate}\n'
            )
            runs.append(read_run(folder))
    groups = curve_groups(runs)
    (panel,) = loss_panels(groups)

    assert [group.name for group in groups] == ["rate-1 (3 seeds)", "rate-2 (3 seeds)", "rate-3 (3 seeds)"]
    assert [(curve.low[-1], pytest.approx(curve.values[-1]), curve.high[-1]) for curve in panel.curves] == [
        (4.0, 14 / 3, 5.5)
    ] * 3
    assert [entry.band for entry in curve_legend(groups)] == [True] * 3
    assert len(plot_losses(runs).axes[0].collections) == 3
