"""Lines of metrics.jsonl that describe the current weights, after a crash, a rollback, a repeated stage, or damage."""

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


def test_a_stage_trained_again_replaces_its_first_training(read):
    """Stage b had four steps; its folder was removed, and two steps of the new training are done."""
    found = read([*A_STAGE, *B_STAGE, event("transition", "b", 0), measured("b", 0, 5.5), *steps("b", 1, 2)])

    assert taken(found) == [("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 1), ("b", 2)]
    assert losses(found) == {("a", 0): 9.0, ("a", 4): 5.0, ("b", 0): 5.5}


@pytest.mark.parametrize(("between", "kept"), [([], True), ([{"kind": "event", "name": "start"}], False)])
def test_a_rollback_to_the_start_of_a_stage_keeps_the_losses_of_step_0(read, between, kept):
    """The weights are the same and are not validated again; after a start event it is another training."""
    lines = [*A_STAGE, *B_STAGE[:4], event("skip_batch", "b", 2), *between, event("transition", "b", 0)]
    found = read([*lines, *steps("b", 1, 1)])

    assert taken(found)[4:] == [("b", 1)]
    assert (("b", 0) in losses(found)) is kept


@pytest.mark.parametrize("stages", [("a", "b"), ()], ids=["with a plan", "without one"])
def test_a_stage_trained_again_undoes_the_later_stages(read, stages):
    """Both folders were removed and a begins again: b has no lines until it is trained."""
    found = read([*A_STAGE, *B_STAGE, event("transition", "a", 0), *steps("a", 1, 1)], stages)

    assert taken(found) == [("a", 1)]
    assert losses(found) == {}


def test_a_stage_inserted_before_another_one_undoes_it(read):
    """[a, b] became [a, c, b]: the transition to c undoes b, which is earlier in the file."""
    lines = [*A_STAGE, *B_STAGE, event("transition", "c", 0), *steps("c", 1, 1)]

    assert {stage for stage, _ in taken(read(lines, ("a", "c", "b")))} == {"a", "c"}


def test_a_resume_undoes_the_steps_after_its_checkpoint(read):
    """The process died at step 4 of b; its newest checkpoint is that of step 2, which was validated."""
    crashed = [event("transition", "b", 0), *steps("b", 1, 2), measured("b", 2, 4.0), *steps("b", 3, 4)]
    found = read([*A_STAGE, *crashed, measured("b", 4, 3.0), event("resume", "b", 2)])

    assert taken(found)[-2:] == [("b", 1), ("b", 2)]
    assert losses(found) == {("a", 0): 9.0, ("a", 4): 5.0, ("b", 2): 4.0}


def test_a_resume_in_an_earlier_stage_undoes_the_later_stages(read):
    """All of b's checkpoints and the end of a are damaged: a resumes after step 2."""
    found = read([*A_STAGE, *B_STAGE, event("resume", "a", 2)])

    assert taken(found) == [("a", 1), ("a", 2)]
    assert losses(found) == {("a", 0): 9.0}


@pytest.mark.parametrize(("name", "step"), [("skip_batch", 3), ("stop", 2)])
def test_steps_that_the_update_guard_did_not_apply_are_dropped(read, name, step):
    """Step 3 had a non-finite loss: it and the fourth, logged with it, did not change the weights."""
    found = read([*A_STAGE, *steps("b", 1, 4), event(name, "b", step)])

    assert taken(found)[-2:] == [("b", 1), ("b", 2)]


def test_a_stop_at_the_end_of_a_skipped_stage_undoes_nothing(read):
    """A signal during the benchmarks of stage a, when b had been trained by an earlier command."""
    assert taken(read([*A_STAGE, *B_STAGE, event("stop", "a", 4)]))[-1] == ("b", 4)


def test_repeated_steps_without_an_event_replace_the_earlier_ones(read):
    """A branch of an older version, which copied no events: b had 4 steps, was trained again, and has 2."""
    lines = [line for line in [*A_STAGE, *B_STAGE, measured("b", 0, 5.5), *steps("b", 1, 2)] if line["kind"] != "event"]
    found = read(lines)

    assert taken(found)[-2:] == [("b", 1), ("b", 2)]
    assert losses(found) == {("a", 0): 9.0, ("a", 4): 5.0, ("b", 0): 5.5}


def test_validations_after_all_steps_of_the_file_count(read):
    """Events, then every second step, then all validations: the thinned files of scripts/reproduce."""
    lines = [event("transition", "b", 0), *steps("a", 2, 2), *steps("a", 4, 4), *steps("b", 2, 2), *steps("b", 4, 4)]
    found = read([*lines, measured("a", 0, 9.0), measured("a", 3, 6.0), measured("b", 1, 4.0)])

    assert len(taken(found)) == 4
    assert losses(found) == {("a", 0): 9.0, ("a", 3): 6.0, ("b", 1): 4.0}


def test_checkpoints_of_a_removed_training_are_dropped(read):
    """The digests of their files distinguish scores of the two."""
    first = [*steps("a", 1, 4), saved("a", 2, "f2"), saved("a", 4, "f4"), *steps("b", 1, 4), saved("b", 4, "g4")]
    found = read([*first, event("transition", "b", 0), *steps("b", 1, 4), saved("b", 4, "h4")])

    assert [line["files"] for line in found.checkpoints] == ["f2", "f4", "h4"]


def test_baseline_losses_are_those_of_the_last_training(read):
    """After a stage was trained again, its step 0 was validated again; the later stage has no baseline any more."""
    lines = [measured("a", 0, 9.0), *steps("a", 1, 1), measured("b", 0, 5.0), event("transition", "a", 0)]

    assert baseline_losses(read([*lines, measured("a", 0, 8.0)])) == {("a", "x"): (8.0, None)}


def test_a_repeated_validation_is_the_baseline_and_the_curve_keeps_the_first(read):
    """Stage b's initial weights on other validation data: forgetting is measured from the new loss."""
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
def test_a_damaged_line_is_skipped_and_reported(tmp_path, damage):
    """Incomplete, zeroed by a power failure, not text, JSON that is not a line of this file, or a line without its
    step."""
    (tmp_path / "metrics.jsonl").write_bytes(START + damage + b"\n" + START)
    found = read_metrics(tmp_path)

    assert len(found.events) == 2
    assert [problem.partition("metrics.jsonl")[2] for problem in found.problems] == [":2: skipped a damaged line"]


def test_many_damaged_lines_are_reported_in_one_sentence(tmp_path):
    """The number of the first, and how many others there are."""
    (tmp_path / "metrics.jsonl").write_bytes(START + b"\x00\n" * 1200 + START)

    assert [problem.partition(":2: ")[2] for problem in read_metrics(tmp_path).problems] == [
        "skipped a damaged line and 1,199 more"
    ]


def test_an_incomplete_last_line_is_skipped_and_reported(tmp_path):
    """After a crash, or while the run writes; reading does not change the file."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(START + b'{"kind": "train", "st')
    found = read_metrics(tmp_path)

    assert len(found.events) == 1
    assert [problem.partition("metrics.jsonl: ")[2] for problem in found.problems] == [
        "skipped its last line, which is incomplete (after a crash, or while it is being written)"
    ]
    assert path.read_bytes().endswith(b'"st')


def test_a_complete_last_line_without_its_newline_is_kept(tmp_path):
    """An editor removed the newline: the line is read, and stays when the run appends more."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(START + START.rstrip())
    read = read_metrics(tmp_path)
    with open_metrics_file(path) as file:
        file.write(START)

    assert (len(read.events), read.problems) == (2, [])
    assert path.read_bytes() == START * 3


def test_a_folder_without_metrics_is_an_error(tmp_path):
    """The message says what to name instead."""
    with pytest.raises(DataError, match=r"metrics.jsonl: cannot be read.*Name the folder of a run"):
        read_metrics(tmp_path)


def test_metrics_without_read_permission_are_an_error_about_permissions(tmp_path):
    """The folder is right, so naming another one does not help."""
    (tmp_path / "metrics.jsonl").write_bytes(START)
    (tmp_path / "metrics.jsonl").chmod(0)
    with modes_count(), pytest.raises(DataError, match=r"Permission denied\. Change its permissions or repair"):
        read_metrics(tmp_path)
