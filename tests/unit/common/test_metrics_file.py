"""Which lines of metrics.jsonl count: after a crash, a rollback, a stage trained again, and with damaged lines."""

import json

import pytest
from permissions import modes_count

from titan_cpt.common.metrics_file import baseline_losses, open_metrics_file, read_metrics
from titan_cpt.errors import DataError

START = b'{"kind": "event", "name": "start"}\n'


def event(name, stage, step):
    return {"kind": "event", "name": name, "stage": stage, "step": step}


def steps(stage, first, last):
    return [{"kind": "train", "stage": stage, "step": step} for step in range(first, last + 1)]


def measured(stage, step, loss=1.0, dataset="x"):
    return {"kind": "validation", "stage": stage, "step": step, "dataset": dataset, "loss_nats_per_token": loss}


def saved(stage, step, files):
    return event("checkpoint", stage, step) | {"files": files}


A_STAGE = [event("transition", "a", 0), measured("a", 0, 9.0), *steps("a", 1, 4), measured("a", 4, 5.0)]
B_STAGE = [event("transition", "b", 0), measured("b", 0, 5.0), *steps("b", 1, 4), measured("b", 4, 3.0)]


@pytest.fixture
def read(tmp_path):
    """read(lines, stages) writes a record and reads it."""

    def read(lines, stages=("a", "b")):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_metrics(tmp_path, stages)

    return read


def taken(metrics):
    return [(line["stage"], line["step"]) for line in metrics.trains]


def losses(metrics):
    return {(line["stage"], line["step"]): line["loss_nats_per_token"] for line in metrics.validations}


def test_a_stage_trained_again_leaves_nothing_of_the_training_that_was_removed(read):
    """Stage b had four steps; its folder was removed, and two steps of the new training are done."""
    found = read([*A_STAGE, *B_STAGE, event("transition", "b", 0), measured("b", 0, 5.5), *steps("b", 1, 2)])

    assert taken(found) == [("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 1), ("b", 2)]
    assert losses(found) == {("a", 0): 9.0, ("a", 4): 5.0, ("b", 0): 5.5}


@pytest.mark.parametrize(("between", "kept"), [([], True), ([{"kind": "event", "name": "start"}], False)])
def test_a_rollback_to_a_stages_start_keeps_the_losses_of_its_first_weights(read, between, kept):
    """They are the same weights and nobody measures them again; after a start in between it is another training."""
    lines = [*A_STAGE, *B_STAGE[:4], event("skip_batch", "b", 2), *between, event("transition", "b", 0)]
    found = read([*lines, *steps("b", 1, 1)])

    assert taken(found)[4:] == [("b", 1)]
    assert (("b", 0) in losses(found)) is kept


@pytest.mark.parametrize("stages", [("a", "b"), ()], ids=["with a plan", "without one"])
def test_a_stage_trained_again_takes_the_later_stages_with_it(read, stages):
    """Both folders were removed and a begins again: nothing of b is known until b is trained."""
    found = read([*A_STAGE, *B_STAGE, event("transition", "a", 0), *steps("a", 1, 1)], stages)

    assert taken(found) == [("a", 1)]
    assert losses(found) == {}


def test_a_stage_inserted_before_another_takes_it_with_it_where_the_plan_says_so(read):
    """[a, b] became [a, c, b]: c's beginning undoes b, of which the file spoke first."""
    lines = [*A_STAGE, *B_STAGE, event("transition", "c", 0), *steps("c", 1, 1)]

    assert {stage for stage, _ in taken(read(lines, ("a", "c", "b")))} == {"a", "c"}


def test_a_resume_undoes_the_steps_behind_its_checkpoint(read):
    """The process died at step 4 of b, its newest checkpoint was of step 2, at which it was measured."""
    crashed = [event("transition", "b", 0), *steps("b", 1, 2), measured("b", 2, 4.0), *steps("b", 3, 4)]
    found = read([*A_STAGE, *crashed, measured("b", 4, 3.0), event("resume", "b", 2)])

    assert taken(found)[-2:] == [("b", 1), ("b", 2)]
    assert losses(found) == {("a", 0): 9.0, ("a", 4): 5.0, ("b", 2): 4.0}


def test_a_resume_in_an_earlier_stage_undoes_the_later_ones(read):
    """All of b's checkpoints and the end of a are damaged: a resumes after step 2."""
    found = read([*A_STAGE, *B_STAGE, event("resume", "a", 2)])

    assert taken(found) == [("a", 1), ("a", 2)]
    assert losses(found) == {("a", 0): 9.0}


@pytest.mark.parametrize(("name", "step"), [("skip_batch", 3), ("stop", 2)])
def test_steps_that_the_guard_held_back_do_not_count(read, name, step):
    """Step 3 had a loss that was not finite: it and the fourth, logged with it, changed no weight."""
    found = read([*A_STAGE, *steps("b", 1, 4), event(name, "b", step)])

    assert taken(found)[-2:] == [("b", 1), ("b", 2)]


def test_a_stop_at_the_end_of_a_skipped_stage_undoes_nothing(read):
    """A signal during the benchmarks of stage a, when b had been trained by an earlier command."""
    assert taken(read([*A_STAGE, *B_STAGE, event("stop", "a", 4)]))[-1] == ("b", 4)


def test_steps_that_are_taken_again_without_an_event_replace_what_followed_them(read):
    """A branch of an older version, which copied no events: b had 4 steps, was trained again, and has 2."""
    lines = [line for line in [*A_STAGE, *B_STAGE, measured("b", 0, 5.5), *steps("b", 1, 2)] if line["kind"] != "event"]
    found = read(lines)

    assert taken(found)[-2:] == [("b", 1), ("b", 2)]
    assert losses(found) == {("a", 0): 9.0, ("a", 4): 5.0, ("b", 0): 5.5}


def test_measurements_behind_all_steps_count_as_in_the_thinned_records_of_the_reproduction(read):
    """Events, then every second step, then all measurements: as scripts/reproduce keeps them."""
    lines = [event("transition", "b", 0), *steps("a", 2, 2), *steps("a", 4, 4), *steps("b", 2, 2), *steps("b", 4, 4)]
    found = read([*lines, measured("a", 0, 9.0), measured("a", 3, 6.0), measured("b", 1, 4.0)])

    assert len(taken(found)) == 4
    assert losses(found) == {("a", 0): 9.0, ("a", 3): 6.0, ("b", 1): 4.0}


def test_checkpoints_of_a_training_that_was_removed_do_not_count(read):
    """By the digests of their files, which tell scores of the one from scores of the other."""
    first = [*steps("a", 1, 4), saved("a", 2, "f2"), saved("a", 4, "f4"), *steps("b", 1, 4), saved("b", 4, "g4")]
    found = read([*first, event("transition", "b", 0), *steps("b", 1, 4), saved("b", 4, "h4")])

    assert [line["files"] for line in found.checkpoints] == ["f2", "f4", "h4"]


def test_forgetting_counts_from_the_step_0_of_the_present_training(read):
    """Trained again, a stage's step 0 was measured anew; the later stage has none any more."""
    lines = [measured("a", 0, 9.0), *steps("a", 1, 1), measured("b", 0, 5.0), event("transition", "a", 0)]

    assert baseline_losses(read([*lines, measured("a", 0, 8.0)])) == {("a", "x"): (8.0, None)}


def test_a_measurement_made_again_is_a_baseline_and_not_the_measurement_of_that_time(read):
    """Of stage b's first weights, on other data: forgetting counts from it, the curve keeps the old one."""
    again = measured("b", 0, 7.0) | {"validation_id": "B", "measured_again": True}
    lines = [*A_STAGE, *B_STAGE, again]
    found, undone = read(lines), read([*lines, event("transition", "b", 0)])

    assert losses(found)["b", 0] == 5.0
    assert baseline_losses(found)["b", "x"] == (7.0, "B")
    assert ("b", "x") not in baseline_losses(undone)


@pytest.mark.parametrize(
    "damage",
    [
        *(b'{"kind": "tra', b"\x00\x00\x00", b"\xff\xfe{}", b"7", b"[]", b'{"no": "kind"}', b'{"kind": []}'),
        *(b"[" * 100_000, b'{"kind": "train", "stage": "a"}', b'{"kind": "train", "stage": "a", "step": "1"}'),
        *(b'{"kind": "event"}', b'{"kind": "validation", "stage": "a", "step": 1, "dataset": "x"}'),
    ],
    ids=range(12),
)
def test_a_damaged_line_is_skipped_and_named(tmp_path, damage):
    """Cut, zeroed by a power failure, not text, JSON that is not a line of a record, or a line without its step."""
    (tmp_path / "metrics.jsonl").write_bytes(START + damage + b"\n" + START)
    found = read_metrics(tmp_path)

    assert len(found.events) == 2
    assert [problem.partition("metrics.jsonl")[2] for problem in found.problems] == [":2: skipped a damaged line"]


def test_many_damaged_lines_are_one_sentence(tmp_path):
    """The first one's number and how many others."""
    (tmp_path / "metrics.jsonl").write_bytes(START + b"\x00\n" * 1200 + START)

    assert [problem.partition(":2: ")[2] for problem in read_metrics(tmp_path).problems] == [
        "skipped a damaged line and 1,199 more"
    ]


def test_a_last_line_that_is_cut_short_is_skipped_and_said(tmp_path):
    """As a crash leaves it, or as it is seen while the run writes; reading does not change the file."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(START + b'{"kind": "train", "st')
    found = read_metrics(tmp_path)

    assert len(found.events) == 1
    assert [problem.partition("metrics.jsonl: ")[2] for problem in found.problems] == [
        "skipped its last line, which is incomplete (after a crash, or while it is being written)"
    ]
    assert path.read_bytes().endswith(b'"st')


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    """An editor took the newline away: the line is read, and still there when the run writes more."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(START + START.rstrip())
    read = read_metrics(tmp_path)
    with open_metrics_file(path) as file:
        file.write(START)

    assert (len(read.events), read.problems) == (2, [])
    assert path.read_bytes() == START * 3


def test_a_folder_without_a_record_is_an_error(tmp_path):
    """With what to name instead."""
    with pytest.raises(DataError, match=r"metrics.jsonl: cannot be read.*Name the folder of a run"):
        read_metrics(tmp_path)


def test_a_record_that_may_not_be_read_is_named_with_its_permissions(tmp_path):
    """The folder is the right one, so that naming another one is no remedy."""
    (tmp_path / "metrics.jsonl").write_bytes(START)
    (tmp_path / "metrics.jsonl").chmod(0)
    with modes_count(), pytest.raises(DataError, match=r"Permission denied\. Change its permissions or repair"):
        read_metrics(tmp_path)
