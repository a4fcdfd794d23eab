"""Sections of the HTML report: bold numbers, runs from scratch, runs that are not comparable."""

import io

from PIL import Image
from rich.console import Console

from titan_cpt.reporting.comparison import compare, incomparable_datasets, print_comparison
from titan_cpt.reporting.run_log import read_run
from titan_cpt.reporting.sections import sections
from unit.reporting.run_folders import AVERAGED, EN_DE, on, union_of


def test_the_lowest_number_of_each_column_is_bold(write_run):
    """Of en 5.1 and 4.2 the second; of AVG 4.15 and 3.7 the second; a column with one number has no best."""
    records = [read_run(write_run("5_percent", EN_DE)), read_run(union_of(write_run))]
    (table,) = next(iter(sections(records))).tables
    places = {(table.head[column], row) for row, column in table.best}

    assert {("en", 1), ("AVG", 1)} <= places
    assert "forgetting" not in {name for name, _ in places}


def test_a_run_from_scratch_is_compared_with_the_losses_of_the_others(write_run):
    """The union's 4.2 on English is 0.2 above the 4.0 of the other run at the end of its English stage."""
    records = [read_run(write_run("5_percent", EN_DE)), read_run(union_of(write_run))]
    drawn = {figure.name: figure for section in sections(records) for figure in section.figures}

    assert Image.open(io.BytesIO(drawn["trade-off"].png)).width > 600
    assert drawn["losses"].svg_light != drawn["losses"].svg_dark


def test_an_average_competes_for_the_lowest_number(write_run):
    """Each run and each average is a row; the columns are the datasets."""
    runs = [read_run(write_run(name, lines)) for name, lines in (("p", EN_DE), ("r", AVERAGED))]
    (table,) = next(iter(sections(runs))).tables

    assert table.head[:3] == ["run", "de", "en"]
    assert [row[:3] for row in table.rows] == [
        ["p", "3.2000", "5.1000"],
        ["r", "3.2000", "5.1000"],
        ["r@average", "2.9000", "4.7000"],
    ]
    assert {(2, 1), (2, 2)} <= set(table.best)


def test_runs_with_different_validation_data_are_not_compared(write_run):
    """No bold number, a sentence that says so, and no point in the trade-off figure."""
    one, other = read_run(write_run("one", on("A", EN_DE))), union_of(write_run)
    (other / "metrics.jsonl").write_text(
        (other / "metrics.jsonl").read_text().replace('"dataset"', '"validation_id": "B", "dataset"')
    )
    records = [one, read_run(other)]
    console = Console(width=140, record=True, file=io.StringIO())
    print_comparison(compare(records), console)
    (table,) = (final := next(iter(sections(records)))).tables

    assert incomparable_datasets(compare(records)) == ["de", "en"]
    assert not {table.head[column] for _, column in table.best} & {"en", "de", "AVG"}
    assert "de, en" in final.lead
    assert "not comparable, measured on different validation data or windows: de, en" in console.export_text()
    assert "trade-off" not in {figure.name for section in sections(records) for figure in section.figures}
