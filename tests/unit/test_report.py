"""What is read from a run's folder: summaries of finished, unfinished and resumed runs, and the command."""

import json
import os
import signal

import pytest
import training
from rich.console import Console

from titan_cpt.cli import main
from titan_cpt.errors import DataError
from titan_cpt.report import print_summary, summarise

pytestmark = training.THEIR_WARNINGS_IGNORED


def stage_of(name, steps, new, *, window=()):
    use = {"tokens": 64 * steps, "replayed_tokens": 0, "epochs": 1.0}
    return {"name": name, "steps": steps, "new_datasets": [new], "final_window": list(window), "datasets": {new: use}}


def train_line(stage, step, tokens_per_s):
    return {"kind": "train", "stage": stage, "step": step, "tokens_per_s": tokens_per_s}


def validation_line(stage, step, dataset, loss, forgetting=None):
    line = {"kind": "validation", "stage": stage, "step": step, "dataset": dataset, "loss_nats_per_token": loss}
    return {**line, "bits_per_byte": 2 * loss, "forgetting_nats_per_token": forgetting}


@pytest.fixture
def run(tmp_path):
    """Writes a run's folder from stages and lines."""

    def write(stages, lines, tail=""):
        plan = {"name": "r", "fingerprint": "00", "step_tokens": 64, "stages": stages}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
        return tmp_path

    return write


def status_of(*arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return left.value.code


def test_the_final_loss_is_the_mean_of_ten_samples_over_the_last_hundred_steps(run):
    """Of 400 steps sampled at 310, 320, ..., 400, at other steps too; losses are step / 100, so that it is 3.55."""
    window = list(range(310, 401, 10))
    lines = [validation_line("a", step, "x", step / 100) for step in range(0, 401, 5)]
    summary = summarise(run([stage_of("a", 400, "x", window=window)], lines))

    assert summary["stages"][0]["final_loss"] == {"x": pytest.approx(3.55, rel=1e-12)}


def test_there_is_no_final_loss_before_its_window_is_full_or_where_none_was_asked_for(run):
    """Nine samples of ten; and a stage without a window."""
    lines = [validation_line("a", step, "x", 1.0) for step in range(310, 400, 10)]
    going = summarise(run([stage_of("a", 400, "x", window=range(310, 401, 10))], lines))
    without = summarise(run([stage_of("a", 400, "x")], lines))

    assert going["stages"][0]["final_loss"] == without["stages"][0]["final_loss"] == {}


def test_of_what_was_written_twice_the_last_counts(run):
    """A resumed run: step 20 was measured again, and step 20's seconds count once."""
    lines = [
        validation_line("a", 0, "x", 5.0),
        validation_line("a", 0, "x", 6.0),
        train_line("a", 20, 64.0),
        validation_line("a", 20, "x", 3.0, 0.5),
        train_line("a", 20, 32.0),
        validation_line("a", 20, "x", 4.0, 0.25),
    ]
    stage = summarise(run([stage_of("a", 20, "y")], lines))["stages"][0]

    assert stage["before"] == {"x": 6.0}
    assert stage["after"] == {"x": 4.0}
    assert stage["forgetting"] == {"x": 0.25}
    assert stage["seconds"] == 2.0  # 64 tokens at 32 tokens/s


def test_seconds_are_the_steps_tokens_over_their_speed(run):
    """Two steps at 64 and one at 16 tokens/s: 1 + 1 + 4 seconds; a step without a speed is left out."""
    lines = [train_line("a", 1, 64.0), train_line("a", 2, 64.0), train_line("a", 3, 16.0), train_line("a", 4, None)]
    stages = summarise(run([stage_of("a", 4, "x"), stage_of("b", 4, "x")], lines))["stages"]

    assert [stage["seconds"] for stage in stages] == [6.0, 0]


def test_adaptation_is_told_of_new_datasets_and_their_domains(run):
    """Forgetting of the old one alone."""
    lines = [
        validation_line("b", 9, "new.wiki", 1.0),
        validation_line("b", 9, "new", 2.0),
        validation_line("b", 9, "old", 3.0, 0.1),
    ]
    stage = summarise(run([stage_of("b", 9, "new")], lines))["stages"][0]

    assert stage["adaptation"] == {"new.wiki": 1.0, "new": 2.0}
    assert stage["forgetting"] == {"old": 0.1}


def test_a_run_that_has_just_begun_has_a_report(run):
    """No line at all, or the beginning of the first."""
    for tail in ("", '{"kind": "ev'):
        stage = summarise(run([stage_of("a", 4, "x")], [], tail))["stages"][0]

        assert (stage["steps_done"], stage["before"], stage["after"], stage["seconds"]) == (0, {}, {}, 0)


def test_the_table_shows_the_numbers_of_a_stage(run):
    """Before, after, forgetting with its sign, and that it is still going."""
    lines = [validation_line("a", 0, "old", 3.0), validation_line("a", 5, "old", 3.25, 0.25)]
    console = Console(width=140, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    print_summary(summarise(run([stage_of("a", 10, "new")], lines)), console)
    text = console.export_text()
    console.file.close()

    assert "stage a (10 steps, 5 done, 0 s)" in text
    assert all(number in text for number in ("3.0000", "3.2500", "+0.2500", "6.500", "640"))


@pytest.mark.parametrize("content", ["", "{"])
def test_a_folder_that_is_no_runs_is_told(tmp_path, content):
    """No plan, or a damaged one."""
    with pytest.raises(DataError, match=r"plan.json: cannot be read"):
        summarise(tmp_path)
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(DataError, match=r"plan.json: cannot be read"):
        summarise(tmp_path)


def test_the_command_reports_a_run_that_is_still_going(tmp_path, capsys):
    """While it trains, and after it was killed: 0 and a table with the steps measured so far; 2 for what is no run."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["stages"][0]["steps"] = 2000
    going = training.Process(training.write_config(raw, tmp_path / "c.toml"))
    going.wait_for(lambda: len(training.lines_of(tmp_path / "run", "validation")) >= 6)
    during = status_of("report", str(tmp_path / "run"))
    shown = capsys.readouterr().out
    going.send(signal.SIGKILL)
    going.end()
    after = status_of("report", str(tmp_path / "run"))
    nothing = status_of("report", str(tmp_path))

    assert (during, after, nothing) == (0, 0, 2)
    assert "stage english (2,000 steps, " in shown
    assert " done, " in shown
    assert "stage german" in shown
