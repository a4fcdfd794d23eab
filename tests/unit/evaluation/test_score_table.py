"""The table of scores and its JSON: changes from the first checkpoint to the last, p-values, averages."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from titan_cpt.evaluation.score_table import format_p, format_score, print_scores, scores_as_json
from titan_cpt.evaluation.scores import ScoreChange
from unit.evaluation.test_scores import scored

BEFORE = scored([0, 0, 1, 1, 0])
AFTER = scored([1, 1, 1, 1, 0], stage="second", steps_done=2000)


def printed(found):
    console = Console(width=140, record=True, file=io.StringIO())
    print_scores(found, console)
    return console.export_text()


def test_the_table_shows_the_changes():
    """A row per task with errors, and the change from the first column to the last."""
    text = printed({"a": [BEFORE], "b": [AFTER]})

    assert "+0.4000 ± 0.2449" in text
    assert "0.1025" in text
    assert "second 2,000" in text
    assert "average" not in text


def test_the_average_is_in_the_last_row():
    """Of two tasks: 0.4 and 0.8 are 0.6, 0.8 and 0.4 are 0.6; a checkpoint outside of runs has its path as title."""
    other = replace(BEFORE, task="boolq", stage="", metrics={"acc": (0.8, None)})
    swapped = [replace(AFTER, metrics={"acc": (0.8, None)}), replace(AFTER, task="boolq", metrics={"acc": (0.4, None)})]
    text = printed({"path/a": [replace(BEFORE, stage="", metrics={"acc": (0.4, None)}), other], "b": swapped})
    (average,) = [line for line in text.splitlines() if "average" in line]

    assert "path/a" in text
    assert average.count(" 0.6000") == 2
    assert "+0.0000" in average


def test_one_checkpoint_has_no_change():
    """Neither column is there; without scores nothing is printed."""
    text = printed({"a": [BEFORE]})

    assert "last - first" not in text
    assert "0.4000" in text
    assert printed({"a": []}) == ""


@pytest.mark.parametrize(
    ("p", "paired", "text"),
    [(None, True, ""), (0.0001, True, "0.0001"), (0.00009, True, "< 0.0001"), (0.25, False, "0.2500 *")],
)
def test_a_p_value_has_four_digits_and_a_star_if_the_samples_differ(p, paired, text):
    """Below 0.0001 it says only that."""
    assert format_p(ScoreChange(value=0.1, stderr=0.1, p=p, paired=paired)) == text


def test_a_change_has_a_sign():
    """A standard error is printed if it is known."""
    assert format_score(0.25, None, signed=True) == "+0.2500"
    assert format_score(0.25, 0.5) == "0.2500 ± 0.5000"


def test_json_has_every_number_of_the_table():
    """Each checkpoint's tasks and average, and the change of each task."""
    found = scores_as_json({"a": [BEFORE], "b": [AFTER]})
    task = found["checkpoints"]["b"]["tasks"]["piqa"]
    change = found["changes"]["piqa"]

    assert (task["shots"], task["metric"], task["value"], task["samples"]) == (0, "acc", 0.8, 5)
    assert task["metrics"]["acc"] == {"value": task["value"], "stderr": task["stderr"]}
    assert found["checkpoints"]["a"]["average"] == {"value": BEFORE.value, "stderr": BEFORE.stderr}
    assert change["value"] == pytest.approx(0.4)
    assert change["p"] == pytest.approx(0.10247043, abs=1e-7)
    assert change["paired"] is True
