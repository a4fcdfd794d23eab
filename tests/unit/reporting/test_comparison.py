"""Comparison rows, computed by hand."""

import io

import pytest
from rich.console import Console

from titan_cpt.reporting.comparison import compare, print_comparison, with_averages
from titan_cpt.reporting.run_log import read_run
from unit.reporting.run_folders import AVERAGED, EN_DE, measured


def test_a_row_has_the_means_of_the_final_window(write_run):
    """By hand: means over steps 9 and 10, 5.1 and 3.2; AVG 4.15; forgetting 5.1 - 4.0; half of the union's compute."""
    (row,) = compare([read_run(write_run("r", EN_DE))])

    assert row.losses == pytest.approx({"en": 5.1, "de": 3.2})
    assert row.average == pytest.approx(4.15)
    assert row.mean_forgetting == pytest.approx(1.1)
    assert row.adaptation == pytest.approx(3.2)
    assert (row.update_share, row.is_done, row.tokens) == (0.5, True, 20_000)


def test_a_row_of_an_unfinished_run_names_its_stage(write_run):
    """With the last validation so far; without losses before the first one.

    A run with all steps but without its last validation is not done; a run that has no validation is.
    """
    going = read_run(write_run("going", EN_DE[:6]))
    blind = read_run(write_run("blind", []))
    new = read_run(write_run("new", [], begun="a"))
    row, unmeasured, empty = compare([going, blind, new])

    assert (row.stage, row.is_done, row.losses, row.tokens) == ("b", False, {"en": 4.0, "de": 7.0}, 20_000)
    assert (empty.losses, empty.average, empty.mean_forgetting, empty.is_done) == ({}, None, None, False)
    assert (empty.stage, empty.tokens) == ("a", 10_000)
    assert (unmeasured.losses, unmeasured.is_done) == ({}, True)


def test_an_average_is_over_the_datasets_trained_on(write_run):
    """The loss of a dataset that no stage trains on is shown and not averaged."""
    lines = [*EN_DE, measured("b", 10, "fr", 100.0)]
    (row,) = compare([read_run(write_run("r", lines))])

    assert row.losses["fr"] == 100.0
    assert row.average == pytest.approx(4.15)


def test_an_average_of_the_weights_has_a_row_of_its_own(write_run):
    """Means over steps 9 and 10: 4.7 and 2.9, so AVG is 3.8; English left training at 4.0."""
    plain, averaged = compare([read_run(write_run(name, lines)) for name, lines in (("p", EN_DE), ("r", AVERAGED))])
    own, average = with_averages([averaged])

    assert with_averages([plain]) == [plain]
    assert (own.losses, own.average, own.forgetting, own.adaptation) == (
        plain.losses,
        plain.average,
        plain.forgetting,
        plain.adaptation,
    )
    assert average.name == "r@average"
    assert average.losses == pytest.approx({"en": 4.7, "de": 2.9})
    assert average.average == pytest.approx(3.8)
    assert average.mean_forgetting == pytest.approx(0.7)
    assert average.adaptation == pytest.approx(2.9)


def test_an_average_without_the_whole_final_window_has_its_last_losses(write_run):
    """Its first snapshot came after step 9: the losses of step 10, and forgetting against the same 4.0."""
    lines = [line for line in AVERAGED if (line["step"], line["dataset"]) != (9, "en@average")]
    _, average = with_averages(compare([read_run(write_run("r", lines))]))

    assert average.losses == pytest.approx({"en": 4.6, "de": 2.9})
    assert average.forgetting == pytest.approx({"en": 0.6})


def test_rows_of_averages_are_printed_below_those_of_their_runs(write_run):
    """The columns are the datasets; the average of a failed run says so too."""
    runs = [read_run(write_run(name, lines)) for name, lines in (("p", EN_DE), ("r", AVERAGED))]
    console = Console(width=100, record=True, file=io.StringIO())
    print_comparison(compare(runs), console, {"r": "no space left"})
    rows = [line.strip("│ ").split("│") for line in console.export_text().splitlines() if line.startswith("│")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}

    assert cells["r"] == ["3.2000", "5.1000", "4.1500", "+1.1000", "0.50x", "failed"]
    assert cells["r@average"] == ["2.9000", "4.7000", "3.8000", "+0.7000", "0.50x", "failed"]
    assert list(cells) == ["p", "r", "r@average"]


def test_datasets_that_do_not_fit_in_the_terminal_are_named_below_the_table(write_run):
    """Twelve datasets in 80 columns: whole numbers of the first ones, the names of the others."""
    datasets = [f"dataset{n:02}" for n in range(12)]
    lines = [*EN_DE, *(measured("b", 10, name, 1.25) for name in datasets)]
    console = Console(width=80, record=True, file=io.StringIO())
    print_comparison(compare([read_run(write_run("r", lines))]), console)
    text = console.export_text()

    assert max(len(line) for line in text.splitlines()) <= 80
    shown = text.count("1.2500")
    assert 1 < shown < 12
    assert f"too narrow: {', '.join([*datasets, 'de', 'en'][shown:])}" in " ".join(text.split())
