"""Rows of metrics.jsonl: names, steps, tokens, times; a file that grows, is damaged or is replaced."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.tracking.rows import ReplacedError, RowReader

PLAN = {"step_tokens": 100, "stages": [{"name": "a", "steps": 4}, {"name": "b", "steps": 3}]}


def train(stage, step, run_step, **more):
    speed = {"tokens_per_s": 50.0, "mfu": None, "memory_gib": 1.0}
    numbers = {"loss_nats_per_token": 2.5, "grad_norm": 0.5, "lr": 1e-3, "replayed_tokens": 0, **speed}
    return {
        "kind": "train",
        "stage": stage,
        "step": step,
        "run_step": run_step,
        "tokens": 100 * run_step,
        **numbers,
        **more,
    }


def event(name, **more):
    return {"kind": "event", "name": name, "time": 1000.0, **more}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    (tmp_path / "metrics.jsonl").touch()
    return tmp_path


def add(run, *lines, end="\n"):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(json.dumps(line) for line in lines) + end)


def test_validation_and_events_have_the_step_and_tokens_of_the_whole_run(run):
    """Stage b begins after the 4 steps of stage a: its step 2 is step 6 of the run, after 600 tokens."""
    loss = {"loss_nats_per_token": 3.0, "bits_per_byte": 4.0, "forgetting_nats_per_token": None}
    add(run, {"kind": "validation", "stage": "b", "step": 2, "dataset": "en", **loss})
    add(run, event("transition", stage="b", step=0), event("stop", stage="b", step=3, signal="SIGTERM"))

    validation, transition, stop = RowReader(run).read()

    assert (validation.run_step, validation.tokens) == (6, 600)
    assert validation.values == {"validation/en/loss_nats_per_token": 3.0, "validation/en/bits_per_byte": 4.0}
    assert (transition.run_step, transition.values) == (4, {"event/transition": 1.0})
    assert (stop.run_step, stop.values) == (7, {"event/stop": 1.0})


def test_a_step_takes_its_tokens_divided_by_the_speed(run):
    """100 tokens at 50 tokens/s after an event at 1000 s: steps at 1002 s and 1004 s; the next event sets the time."""
    add(run, event("start"), train("a", 1, 1), train("a", 2, 2), event("stop", stage="a", step=2) | {"time": 1010.0})

    assert [row.time for row in RowReader(run).read()] == [1002.0, 1004.0, 1010.0]


def test_tokens_and_times_follow_a_ramp_and_another_length(run):
    """Steps of 100, 100, 300 and 300 tokens in `a`, of 50 in `b`; 50 tokens/s."""
    stages = [{"seq_len": 10, "batch_sizes": [[0, 10], [2, 30]]}, {"seq_len": 25, "batch_sizes": [[0, 2]]}]
    plan = {"stages": [one | more for one, more in zip(PLAN["stages"], stages, strict=True)]}
    (run / "plan.json").write_text(json.dumps({"step_tokens": 100} | plan))
    steps = [train("a", step, step, tokens=tokens) for step, tokens in ((1, 100), (2, 200), (3, 500), (4, 800))]
    add(run, event("start"), *steps, event("resume", stage="a", step=1), train("b", 1, 5, tokens=850))
    rows = RowReader(run).read()

    assert [row.tokens for row in rows] == [100, 200, 500, 800, 100, 850]
    assert [row.time for row in rows] == [1002.0, 1004.0, 1010.0, 1016.0, 1000.0, 1001.0]


def test_a_repeated_step_is_a_row_of_its_own(run):
    """A crash after step 2 and a resume from step 1: the tracker gets step 2 twice, in this order."""
    add(run, train("a", 1, 1), train("a", 2, 2), event("resume", stage="a", step=1), train("a", 2, 2))

    assert [(row.line, row.run_step) for row in RowReader(run).read()] == [(1, 1), (2, 2), (3, 1), (4, 2)]


def test_damaged_lines_are_skipped_and_counted(run):
    """Line numbers stay those of the file."""
    add(run, train("a", 1, 1))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr\n[1]\n\n{"kind": "train"}\n')
    add(run, train("a", 2, 2))

    assert [row.line for row in RowReader(run).read()] == [1, 6]


def test_a_registered_metric_and_the_number_of_the_stage_have_the_names_of_tensorboard(run):
    """metric/METRIC/NAME; data/stage counts from 1."""
    value = {
        "kind": "metric",
        "stage": "b",
        "step": 1,
        "run_step": 5,
        "metric": "copy",
        "name": "accuracy",
        "value": 0.5,
    }
    add(run, value, train("b", 2, 6))
    metric, step = RowReader(run).read()

    assert (metric.run_step, metric.values) == (5, {"metric/copy/accuracy": 0.5})
    assert step.values["data/stage"] == 2.0


def test_infinite_and_missing_numbers_are_omitted(run):
    """metrics.jsonl has null for them."""
    add(run, train("a", 1, 1, loss_nats_per_token=None, grad_norm=None))

    assert "train/loss_nats_per_token" not in RowReader(run).read()[0].values


def test_scores_have_the_names_of_tensorboard(run):
    """evaluation/TASK/METRIC, and the average by suite."""
    add(run, event("evaluation", stage="a", step=4, suite="paper_german", scores={"arc_de": 0.2, "average": 0.3}))

    assert RowReader(run).read()[0].values == {"evaluation/arc_de/acc": 0.2, "evaluation/paper_german/average": 0.3}


def test_scores_of_an_average_are_curves_of_their_own(run):
    """With the names that they have in TensorBoard."""
    scores = {"arc_de": 0.2, "average": 0.3}
    add(run, event("evaluation", stage="a", step=4, suite="paper_german", scores=scores, weights="average"))

    assert RowReader(run).read()[0].values == {
        "evaluation/arc_de@average/acc": 0.2,
        "evaluation/paper_german@average/average": 0.3,
    }


@given(cuts=st.lists(st.integers(0, 4000), max_size=6))
def test_rows_do_not_depend_on_when_the_file_is_read(tmp_path_factory, cuts):
    """Reading a file as it grows by any pieces gives the rows of reading it once."""
    run = tmp_path_factory.mktemp("run")
    (run / "plan.json").write_text(json.dumps(PLAN))
    add(run, event("start"), *(train("a", step, step) for step in range(1, 5)), event("stop", stage="a", step=4))
    whole = (run / "metrics.jsonl").read_bytes()
    at_once = RowReader(run)
    expected = at_once.read()

    (run / "metrics.jsonl").write_bytes(b"")
    reader, rows = RowReader(run), []
    for cut in [*sorted(cuts), len(whole)]:
        (run / "metrics.jsonl").write_bytes(whole[:cut])
        rows += reader.read()

    assert rows == expected
    assert (reader.lines, reader.crc) == (at_once.lines, at_once.crc)


def test_a_shorter_file_is_reported(run):
    """Another file has taken its place."""
    add(run, train("a", 1, 1))
    reader = RowReader(run)
    reader.read()
    (run / "metrics.jsonl").write_text("")

    with pytest.raises(ReplacedError):
        reader.read()
