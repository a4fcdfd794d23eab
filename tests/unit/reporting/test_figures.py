"""Figures of the report, checked by the lines that they draw."""

from titan_cpt.reporting.comparison import ComparisonRow
from titan_cpt.reporting.figures import plot_losses, plot_trade_off
from titan_cpt.reporting.run_log import read_run
from unit.reporting.run_folders import EN_DE, on


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


def test_no_two_points_of_the_trade_off_look_alike():
    """Seven colors, four markers; a run from scratch is hollow."""
    rows = [
        ComparisonRow(f"run {n}", "s", True, {}, None, {"en": 0.1} if n else {}, 3.0 + n, 1, 1.0) for n in range(28)
    ]
    points = plot_trade_off([(number, row, 0.1) for number, row in enumerate(rows)]).axes[0].lines

    assert len({(point.get_color(), point.get_marker()) for point in points}) == 28
    assert [point.get_markerfacecolor() == "none" for point in points] == [True] + [False] * 27
