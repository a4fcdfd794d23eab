"""A run that is followed shows what a reader of the whole file sees, however the file grows."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from permissions import modes_count

from titan_cpt.common.metrics_file import read_metrics
from titan_cpt.errors import DataError
from titan_cpt.reporting.run_list import list_runs
from titan_cpt.reporting.watch.run_follower import RunFollower, StepCurve

STAGES = ("a", "b")
STEPS = st.integers(0, 6)
LINES = st.one_of(
    st.builds(
        lambda stage, step, loss: {"kind": "train", "stage": stage, "step": step, "loss_nats_per_token": loss},
        st.sampled_from(STAGES),
        STEPS,
        st.floats(0, 9),
    ),
    st.builds(
        lambda stage, step, dataset, loss, again: {
            **{"kind": "validation", "stage": stage, "step": step, "dataset": dataset, "loss_nats_per_token": loss},
            **({"measured_again": True} if again else {}),
        },
        st.sampled_from(STAGES),
        STEPS,
        st.sampled_from(("x", "y")),
        st.floats(0, 9),
        st.booleans(),
    ),
    st.builds(
        lambda name, stage, step: {"kind": "event", "name": name, "stage": stage, "step": step},
        st.sampled_from(("transition", "resume", "skip_batch", "stop", "checkpoint")),
        st.sampled_from(STAGES),
        STEPS,
    ),
    st.just("damaged"),
)


def seen(run):
    """What a follower has: training losses, validations and checkpoints."""
    trains, validations, checkpoints = {}, {}, set()
    for stage in STAGES:
        curves = run.curves(stage)
        for step, loss in zip(curves.training.steps, curves.training.values["loss_nats_per_token"], strict=True):
            trains[stage, step] = loss
        for dataset, curve in curves.validations.items():
            for step, loss in zip(curve.steps, curve.values["loss_nats_per_token"], strict=True):
                validations[stage, step, dataset] = loss
        checkpoints |= {(stage, step) for step in curves.checkpoints}
    return trains, validations, checkpoints


def expected(folder):
    """The same from the reader of whole files."""
    found = read_metrics(folder, STAGES)
    return (
        {(line["stage"], line["step"]): line["loss_nats_per_token"] for line in found.trains},
        {(line["stage"], line["step"], line["dataset"]): line["loss_nats_per_token"] for line in found.validations},
        {(line["stage"], line["step"]) for line in found.checkpoints},
    )


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(LINES, min_size=1, max_size=40), cuts=st.lists(st.integers(0, 3000), max_size=6))
def test_a_file_that_grows_is_read_as_the_whole_file(tmp_path_factory, lines, cuts):
    """Rollbacks, resumes, repeated stages and damaged lines included; the pieces end anywhere in a line."""
    folder = tmp_path_factory.mktemp("run")
    content = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    (folder / "plan.json").write_text(json.dumps(plan_of({"a": 6, "b": 6})))
    run = RunFollower(folder)
    ends = sorted({min(cut, len(content)) for cut in cuts} | {len(content)})
    for begin, end in zip([0, *ends], ends, strict=False):
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(content[begin:end])
        while run.refresh(most_bytes=100):
            pass

    assert seen(run) == expected(folder)
    assert run.damaged_lines == lines.count("damaged")


def plan_of(steps):
    """The keys of a plan.json that reports need."""
    known = {"tokens": 1, "union_tokens": 1, "new_datasets": ["x"], "datasets": {"x": {}}, "final_window": []}
    stages = [{"name": name, "steps": count, **known} for name, count in steps.items()]
    return {"name": "run", "fingerprint": "f", "step_tokens": 10, "stages": stages}


def write(folder, *lines, end="\n"):
    """Append lines to metrics.jsonl."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).removesuffix("\n") + end)


def step(number, stage="a", speed=100.0, loss=1.0):
    """The line of a training step."""
    return {"kind": "train", "stage": stage, "step": number, "loss_nats_per_token": loss, "tokens_per_s": speed}


def test_a_last_line_that_a_new_start_cuts_off_is_not_joined_with_the_next(tmp_path):
    """A kill left half a line; the next start removes it and writes longer lines in its place."""
    write(tmp_path, step(1), step(2), end="")
    path = tmp_path / "metrics.jsonl"
    run = RunFollower(tmp_path)
    run.refresh()
    path.write_bytes(path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1])
    write(tmp_path, step(2), step(3))
    run.refresh()

    assert list(run.curves("a").training.steps) == [1, 2, 3]
    assert run.damaged_lines == 0


@pytest.mark.parametrize("longer", [0, 40])
def test_a_run_that_was_removed_and_begun_again_is_read_anew(tmp_path, longer):
    """Also if its new file is longer by then."""
    write(tmp_path, {"kind": "event", "name": "start", "time": 1.5}, *map(step, range(1, 20)))
    run = RunFollower(tmp_path)
    run.refresh()
    (tmp_path / "metrics.jsonl").unlink()
    write(
        tmp_path,
        {"kind": "event", "name": "start", "time": 2.5},
        *(step(number, loss=2.0) for number in range(1, 3 + longer)),
    )
    run.refresh()
    training = run.curves("a").training

    assert list(training.steps) == list(range(1, 3 + longer))
    assert set(training.values["loss_nats_per_token"]) == {2.0}


def test_a_new_plan_replaces_the_old_one(tmp_path):
    """A stage was appended; what was measured stays."""
    (tmp_path / "plan.json").write_text(json.dumps(plan_of({"a": 4})))
    write(tmp_path, *map(step, range(1, 5)))
    run = RunFollower(tmp_path)
    run.refresh()
    before = (run.stage, run.run_step, dict(run.steps))
    (tmp_path / "plan.json").unlink()
    (tmp_path / "plan.json").write_text(json.dumps(plan_of({"a": 4, "b": 6})))
    write(tmp_path, step(1, "b"))
    run.refresh()

    assert before == ("a", 4, {"a": 4})
    assert (run.stage, run.run_step, dict(run.steps)) == ("b", 5, {"a": 4, "b": 6})


def test_the_time_left_follows_from_the_recent_throughput(tmp_path):
    """60 steps of 10 tokens, half of them at 50 and half at 100 tokens/s: the last 50 take 20 x 0.2 + 30 x 0.1 s."""
    (tmp_path / "plan.json").write_text(json.dumps(plan_of({"a": 100})))
    write(tmp_path, *(step(number, speed=50.0 if number <= 30 else 100.0) for number in range(1, 61)))
    run = RunFollower(tmp_path)
    unknown = run.seconds_left(whole_run=True)
    run.refresh()

    assert math.isnan(unknown)
    assert math.isclose(run.seconds_left(whole_run=True), 40 * 0.14)


def test_the_time_left_counts_the_flops_of_each_stage(tmp_path):
    """Steps of 4 tokens at 2 FLOPs in `a`, of 8 at 4 in `b`: 10 tokens/s are 20 FLOP/s; left are 3 x 8 and 5 x 32."""
    plan = plan_of({"a": 4, "b": 5})
    plan["stages"][0] |= {"seq_len": 4, "batch_sizes": [[0, 1]], "flops": 4 * 4 * 2}
    plan["stages"][1] |= {"seq_len": 4, "batch_sizes": [[0, 2]], "flops": 5 * 8 * 4}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    write(tmp_path, step(1, speed=10.0))
    run = RunFollower(tmp_path)
    run.refresh()

    assert math.isclose(run.seconds_left(whole_run=False), 3 * 8 / 20)
    assert math.isclose(run.seconds_left(whole_run=True), (3 * 8 + 5 * 32) / 20)


def test_the_newest_validation_may_be_of_an_earlier_stage(tmp_path):
    """Until the next stage has measured its own."""
    (tmp_path / "plan.json").write_text(json.dumps(plan_of({"a": 4, "b": 6})))
    line = {"kind": "validation", "stage": "a", "step": 4, "dataset": "x", "loss_nats_per_token": 2.0}
    write(tmp_path, line, step(1, "b"))
    run = RunFollower(tmp_path)
    run.refresh()
    loss, forgetting = run.newest_validation("x")
    write(tmp_path, {**line, "stage": "b", "step": 0, "loss_nats_per_token": 3.0, "forgetting_nats_per_token": 1.0})
    run.refresh()

    assert (loss, math.isnan(forgetting)) == (2.0, True)
    assert run.newest_validation("x") == (3.0, 1.0)
    assert run.datasets() == ["x"]


def test_a_run_without_a_plan_is_not_finished(tmp_path):
    """Its steps so far are all that is known; `titan-cpt runs` says the same."""
    stop = {"kind": "event", "name": "stop", "stage": "a", "step": 1, "signal": "SIGTERM"}
    saved = tmp_path / "a" / "step-00000001"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text("{}")
    write(tmp_path, step(1), stop)
    run = RunFollower(tmp_path)
    run.refresh()

    assert run.state() == ("stopped", "by SIGTERM")
    assert list_runs(tmp_path)[0].state == "stopped"


def test_a_run_that_was_removed_is_no_longer_running(tmp_path):
    """The curves that were read stay."""
    write(tmp_path, step(1))
    run = RunFollower(tmp_path)
    run.refresh()
    (tmp_path / "metrics.jsonl").unlink()
    run.refresh()

    assert run.state() == ("failed", f"{tmp_path} was removed or renamed")
    assert run.curves("a").step == 1


def test_a_log_that_may_not_be_read_is_an_error(tmp_path):
    """Without it a run of any length would look as if it had not begun."""
    write(tmp_path, step(1))
    (tmp_path / "metrics.jsonl").chmod(0)
    with modes_count(), pytest.raises(PermissionError, match=r"metrics\.jsonl"):
        RunFollower(tmp_path).refresh()


def test_a_damaged_plan_is_an_error(tmp_path):
    """With the remedy."""
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan\.json: cannot be read"):
        RunFollower(tmp_path).refresh()


def test_a_curve_keeps_its_steps_in_order():
    """A step is replaced or inserted; cutting drops later ones."""
    curve = StepCurve("loss")
    for number, loss in ((2, 1.0), (5, 2.0), (3, 3.0), (5, 4.0), (1, None)):
        curve.put(number, {"loss": loss})
    curve.cut(after=3)

    assert list(curve.steps) == [1, 2, 3]
    assert str(list(curve.values["loss"])) == str([math.nan, 1.0, 3.0])
    assert curve.last("loss") == 3.0
