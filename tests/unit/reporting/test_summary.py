"""Summaries of finished, unfinished and resumed runs, and `titan-cpt report`."""

import io
import json
import signal

import pytest
import training
from rich.console import Console

from titan_cpt.cli import main
from titan_cpt.reporting.summary import print_summary, summarize

pytestmark = training.THEIR_WARNINGS_IGNORED


def stage_of(name, steps, new, *, window=()):
    use = {"tokens": 64 * steps, "replayed_tokens": 0, "epochs": 1.0}
    size = {"steps": steps, "tokens": 64 * steps, "union_tokens": 64 * steps}
    return {"name": name, **size, "new_datasets": [new], "final_window": list(window), "datasets": {new: use}}


def train_line(stage, step, tokens_per_s):
    return {"kind": "train", "stage": stage, "step": step, "tokens_per_s": tokens_per_s}


def validation_line(stage, step, dataset, loss, forgetting=None):
    line = {"kind": "validation", "stage": stage, "step": step, "dataset": dataset, "loss_nats_per_token": loss}
    return {**line, "bits_per_byte": loss and 2 * loss, "forgetting_nats_per_token": forgetting}


@pytest.fixture
def run(tmp_path):
    """run(stages, lines) writes a run folder and returns its path."""

    def write(stages, lines, tail=""):
        plan = {"name": "r", "fingerprint": "00", "step_tokens": 64, "stages": stages}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
        return tmp_path

    return write


def shown(folder):
    """The printed report of a run."""
    console = Console(width=140, record=True, file=io.StringIO())
    print_summary(summarize(folder), console)
    return console.export_text()


def status_of(*arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return left.value.code


def test_the_final_loss_is_the_mean_of_ten_samples_over_the_last_hundred_steps(run):
    """Of 400 steps sampled at 310, 320, ..., 400, at other steps too; losses are step / 100, so that it is 3.55."""
    window = list(range(310, 401, 10))
    lines = [validation_line("a", step, "x", step / 100) for step in range(0, 401, 5)]
    summary = summarize(run([stage_of("a", 400, "x", window=window)], lines))

    assert summary["stages"][0]["final_loss"] == {"x": pytest.approx(3.55, rel=1e-12)}


def test_there_is_no_final_loss_without_a_complete_window(run):
    """Nine samples of ten; and a stage without a final window."""
    lines = [validation_line("a", step, "x", 1.0) for step in range(310, 400, 10)]
    going = summarize(run([stage_of("a", 400, "x", window=range(310, 401, 10))], lines))
    without = summarize(run([stage_of("a", 400, "x")], lines))

    assert going["stages"][0]["final_loss"] == without["stages"][0]["final_loss"] == {}


def test_the_last_line_of_a_step_counts(run):
    """A resumed run: step 20 was validated again, and its seconds count once."""
    lines = [
        validation_line("a", 0, "x", 5.0),
        validation_line("a", 0, "x", 6.0),
        train_line("a", 20, 64.0),
        validation_line("a", 20, "x", 3.0, 0.5),
        train_line("a", 20, 32.0),
        validation_line("a", 20, "x", 4.0, 0.25),
    ]
    stage = summarize(run([stage_of("a", 20, "y")], lines))["stages"][0]

    assert stage["before"] == {"x": 6.0}
    assert stage["after"] == {"x": 4.0}
    assert stage["forgetting"] == {"x": 0.25}
    assert stage["seconds"] == 2.0  # 64 tokens at 32 tokens/s


def test_seconds_are_tokens_divided_by_throughput(run):
    """Two steps at 64 and one at 16 tokens/s: 1 + 1 + 4 seconds; a step without a throughput is skipped."""
    lines = [train_line("a", 1, 64.0), train_line("a", 2, 64.0), train_line("a", 3, 16.0), train_line("a", 4, None)]
    stages = summarize(run([stage_of("a", 4, "x"), stage_of("b", 4, "x")], lines))["stages"]

    assert [stage["seconds"] for stage in stages] == [6.0, 0]


def test_adaptation_is_reported_for_new_datasets_and_their_domains(run):
    """Forgetting only for the old dataset."""
    lines = [
        validation_line("b", 9, "new.wiki", 1.0),
        validation_line("b", 9, "new", 2.0),
        validation_line("b", 9, "old", 3.0, 0.1),
    ]
    stage = summarize(run([stage_of("b", 9, "new")], lines))["stages"][0]

    assert stage["adaptation"] == {"new.wiki": 1.0, "new": 2.0}
    assert stage["forgetting"] == {"old": 0.1}


def test_a_run_that_has_just_begun_has_a_report(run):
    """No line, or an incomplete first line."""
    for tail, said in ("", 0), ('{"kind": "ev', 1):
        summary = summarize(run([stage_of("a", 4, "x")], [], tail))
        stage = summary["stages"][0]

        assert (stage["steps_done"], stage["before"], stage["after"], stage["seconds"]) == (0, {}, {}, 0)
        assert (stage["is_begun"], len(summary["problems"])) == (False, said)


def test_the_table_shows_the_numbers_of_a_stage(run):
    """`left at` is 0.25 below the loss after the stage, which is the forgetting."""
    lines = [
        validation_line("a", 0, "old", 3.125),
        train_line("a", 10, 64.0),
        validation_line("a", 10, "old", 3.5, 0.25),
    ]
    text = shown(run([stage_of("a", 10, "new")], lines))
    head = next(line for line in text.splitlines() if "loss before" in line)
    (row,) = (line for line in text.splitlines() if line.strip("│ ").startswith("old"))

    assert [cell.strip() for cell in head.strip("┃").split("┃")] == [
        *("dataset", "tokens", "replay", "loss before", "left at", "after", "forgetting", "bits per byte")
    ]
    assert row.replace("│", " ").split() == ["old", "3.1250", "3.2500", "3.5000", "+0.2500", "7.000"]
    assert "forgetting = after - left at" in text
    assert "640" in text


def test_a_stage_with_new_tokens_shows_the_bits_per_byte_that_it_began_with(run):
    """Two bits a nat in these lines; a stage without new tokens has no such line."""
    lines = [validation_line("a", 0, "old", 3.125), validation_line("a", 10, "old", 3.5, 0.25)]
    stage = stage_of("a", 10, "new")
    text = " ".join(shown(run([{**stage, "new_rows": {"kind": "mean"}}], lines)).split())

    assert "new tokens since stage a: losses in nats per token do not compare" in text
    assert "at step 0 of the stage: old 6.250" in text
    assert "new tokens" not in shown(run([stage], lines))


def test_a_terminal_of_80_columns_shows_every_number_of_a_table(run):
    """Without borders, with short token counts; a name that does not fit continues on the next line."""
    name = "a_dataset_with_a_long_name"
    lines = [validation_line("a", 0, name, 13.125), validation_line("a", 20_000, name, 10.5, -10.25)]
    folder = run([stage_of("a", 20_000, name), stage_of("b", 1, name)], lines)
    console = Console(width=80, record=True, file=io.StringIO())
    print_summary(summarize(folder), console)
    text = console.export_text()
    rows = [line.split() for line in text.splitlines()]

    assert max(len(line) for line in text.splitlines()) <= 80
    assert [row[1:] for row in rows if "13.1250" in row] == [
        ["1.28M", "0", "13.1250", "20.7500", "10.5000", "-10.2500", "21.000"]
    ]
    assert name in "".join(row[0] for row in rows if row)


def test_a_stopped_run_shows_the_steps_done_and_no_table_of_later_stages(run):
    """Stopped at step 151 of 200, validated at 100; the second stage has not begun."""
    lines = [validation_line("a", 0, "x", 9.0), validation_line("a", 100, "x", 4.0)]
    steps = [train_line("a", step, 6.4) for step in range(1, 152)]
    folder = run([stage_of("a", 200, "x"), stage_of("b", 77, "y")], [*steps, *lines])
    text, stages = shown(folder), summarize(folder)["stages"]

    assert "stage a (200 steps, 151 done, losses after step 100, 1510 s)" in text
    assert "planned tokens" in text
    assert "stage b: not begun, 77 steps planned" in text
    assert f"{77 * 64:,}" not in text
    assert [(s["steps_done"], s["trained_tokens"], s["is_begun"], s["is_done"]) for s in stages] == [
        (151, 151 * 64, True, False),
        (0, 0, False, False),
    ]


def test_seconds_of_a_log_without_every_step_say_how_many_steps_they_cover(run):
    """Every fifth of 20 steps was logged, at a second each; a log without any step has no duration."""
    lines = [train_line("a", step, 64.0) for step in range(5, 21, 5)]
    stages = [stage_of("a", 20, "x"), stage_of("b", 20, "x")]
    text = shown(run(stages, [*lines, validation_line("a", 20, "x", 1.0), validation_line("b", 20, "x", 1.0)]))

    assert "stage a (20 steps, 4 s for the 4 steps that are recorded)" in text
    assert "stage b (20 steps, duration not recorded)" in text


def test_losses_of_different_validation_data_are_marked_and_never_averaged(run):
    """x was measured on A before and on B after, y on A only; the final window of x has both.

    Once the initial weights were measured again on B, that is the loss before.
    """
    window = stage_of("a", 20, "z", window=(10, 20))
    lines = [
        *(validation_line("a", step, "x", 3.0, None) | {"validation_id": "A"} for step in (0, 10)),
        *(validation_line("a", step, "y", 2.0, None) | {"validation_id": "A"} for step in (0, 10, 20)),
        validation_line("a", 20, "x", 2.5) | {"validation_id": "B"},
    ]
    marked = summarize(run([window], lines))["stages"][0]
    text = shown(run([window], lines))
    again = validation_line("a", 0, "x", 3.5) | {"validation_id": "B", "measured_again": True}
    renewed = summarize(run([window], [*lines, again]))["stages"][0]

    assert (marked["not_comparable"], marked["before"], marked["after"]["x"]) == (["x"], {"x": 3.0, "y": 2.0}, 2.5)
    assert marked["final_loss"] == {"y": 2.0}
    assert "3.0000 *" in text
    assert "2.0000 *" not in text
    assert "* measured on other validation data or windows" in text
    assert (renewed["not_comparable"], renewed["before"]) == ([], {"x": 3.5, "y": 2.0})


def test_losses_of_older_versions_are_comparable_unless_a_change_was_logged(run):
    """They have no validation_id; an event lists the datasets whose validation data changed."""
    lines = [validation_line("a", 0, "x", 3.0), validation_line("a", 4, "x", 2.5) | {"validation_id": "B"}]
    event = {"kind": "event", "name": "validation_changed", "stage": "a", "step": 2, "datasets": ["x"]}

    assert summarize(run([stage_of("a", 4, "z")], lines))["stages"][0]["not_comparable"] == []
    assert summarize(run([stage_of("a", 4, "z")], [*lines, event]))["stages"][0]["not_comparable"] == ["x"]
    both_old = [lines[0], validation_line("a", 4, "x", 2.5)]
    assert summarize(run([stage_of("a", 4, "z")], [*both_old, event]))["stages"][0]["not_comparable"] == []


def test_a_loss_that_is_not_finite_is_ignored(run):
    """The log has null for it; the validation before it counts, and the report says so."""
    lines = [validation_line("a", 0, "x", 3.0), validation_line("a", 5, "x", None)]
    summary = summarize(run([stage_of("a", 5, "x")], lines))
    stage = summary["stages"][0]

    assert summary["problems"] == ["r: the validation loss of x after step 5 of a is not finite"]
    assert (stage["after"], stage["measured_at"], stage["is_done"]) == ({"x": 3.0}, 0, False)


def test_a_run_that_cannot_be_read_does_not_stop_the_report_of_the_others(run, tmp_path, capsys):
    """A damaged line is reported and the rest is shown; a damaged plan is status 2, after the tables."""
    folder = run([stage_of("a", 4, "x")], [validation_line("a", 4, "x", 1.5)], tail="\0\0\n")
    status = status_of("report", str(folder))
    one = capsys.readouterr()
    both = status_of("report", str(tmp_path / "nowhere"), str(folder), "--html", str(tmp_path / "out"))
    two = capsys.readouterr()

    assert (status, both) == (0, 2)
    assert "metrics.jsonl:2: skipped a damaged line" in " ".join(one.out.split())
    assert "1.5000" in one.out
    assert "1.5000" in two.out
    assert "nowhere: no such file or folder" in two.err
    assert (tmp_path / "out" / "index.html").exists()


def test_the_command_reports_a_run_that_is_still_training(tmp_path, capsys):
    """Also after it was killed: status 0 and a table of the steps so far; 2 for a path that is not a run."""
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
