"""Comparison rows, computed by hand."""

import io

import pytest
from rich.console import Console

from titan_cpt.reporting.comparison import compare, print_comparison
from titan_cpt.reporting.run_log import read_run
from unit.reporting.run_folders import EN_DE, measured


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
