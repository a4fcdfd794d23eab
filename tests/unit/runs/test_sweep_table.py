"""The tables of a sweep, as the command prints them."""

import training
from sweeps import FRACTION, status_of

pytestmark = training.THEIR_WARNINGS_IGNORED


def test_the_plan_of_a_sweep_lists_every_run(swept, capsys):
    """22 steps of 64 tokens each, and the shared stage; the invalid run has its error message below the table."""
    assert status_of("sweep", swept({FRACTION: [0.0, 0.25, 1.25]}), "--plan") == 0
    shown = capsys.readouterr().out

    assert shown.count("1,408") == 2
    assert shown.count("english") == 2
    assert "invalid" in shown
    assert "stages.german.replay.fraction: must be in [0, 1), got 1.25" in shown


def test_a_file_without_a_sweep_table_is_listed_as_a_single_run(swept, capsys):
    """And a sweep is not."""
    assert status_of("sweep", swept({}), "--plan") == 0
    assert "has no [sweep], so it is a single run" in capsys.readouterr().out
    assert status_of("sweep", swept({FRACTION: [0.0, 0.25]}), "--plan") == 0
    assert "single run" not in capsys.readouterr().out
