"""Scores: significance of changes against hand-computed values, tables, reports, and damaged files."""

import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.errors import DataError
from titan_cpt.evaluation.scores import (
    FORMAT,
    Score,
    average_score,
    file_name,
    read_score,
    read_scores,
    score_change,
    write_score,
)
from titan_cpt.reporting.benchmark_table import benchmark_table, example_generations
from titan_cpt.reporting.run_log import read_run

SCORED_FILES = "f00d"
"""Digest of the evaluated checkpoint's files."""


def scored(values, documents="same", task="piqa", **changes):
    """A score with the standard error that the harness computes."""
    mean = sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    made = Score(
        task=task,
        shots=0,
        metric="acc",
        metrics={"acc": (mean, error)},
        samples=len(values),
        limit=None,
        documents=documents,
        per_sample={"acc": values},
        identity={"files": SCORED_FILES},
        checkpoint="x",
        stage="first",
        stage_index=0,
        steps_done=10,
        run_step=10,
        seconds=1.0,
    )
    return replace(made, **changes)


def test_a_paired_change():
    """Of five samples two become right and none wrong: d = (1, 1, 0, 0, 0), mean 0.4, error sqrt(1.2 / 20)."""
    change = score_change(scored([0, 0, 1, 1, 0]), scored([1, 1, 1, 1, 0]))

    assert change.paired
    assert change.value == pytest.approx(0.4)
    assert change.stderr == pytest.approx(math.sqrt(0.06))
    assert change.p == pytest.approx(0.10247043, abs=1e-7)  # 2 (1 - Phi(1.6329932)), from a table of the normal


def test_an_unpaired_change():
    """Other samples: the errors 0.2 and 0.1 give sqrt(0.05)."""
    one = scored([0.0, 1.0], documents="some", metrics={"acc": (0.5, 0.2)})
    other = scored([0.0, 1.0], documents="others", metrics={"acc": (0.9, 0.1)})
    change = score_change(one, other)

    assert not change.paired
    assert (change.value, change.stderr) == pytest.approx((0.4, math.sqrt(0.05)))


def test_the_p_value_without_variance():
    """p is 1 if no sample changed, and 0 if all changed alike."""
    assert score_change(scored([0, 1, 1]), scored([0, 1, 1])).p == 1.0
    assert score_change(scored([0, 0, 0]), scored([1, 1, 1])).p == 0.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_swapping_both_scores_changes_only_the_sign(pairs):
    """The same error and the same p."""
    one, other = scored([float(a) for a, _ in pairs]), scored([float(b) for _, b in pairs])
    forth, back = score_change(one, other), score_change(other, one)

    assert forth.value == pytest.approx(-back.value)
    assert (forth.stderr, forth.p) == pytest.approx((back.stderr, back.p))


def test_an_average_is_the_unweighted_mean():
    """Large tasks do not count more than small ones; errors 0.3 and 0.4 give 0.5 / 2."""
    small = scored([1.0, 0.0], metrics={"acc": (0.5, 0.3)})
    large = scored([1.0] * 50, metrics={"acc": (1.0, 0.4)})

    assert average_score([small, large]) == pytest.approx((0.75, 0.25))
    assert average_score([small, replace(large, metrics={"acc": (1.0, None)})]) == (0.75, None)


def test_scores_are_sorted_by_training_step(tmp_path):
    """In a run's folder, whatever the names of the stages."""
    for number, stage in enumerate(("zulu", "alpha")):
        folder = tmp_path / "evaluations" / stage / "step-00000010"
        folder.mkdir(parents=True)
        score = scored([0.0, 1.0], stage=stage, stage_index=number)
        (folder / file_name("piqa", 0, None)).write_text(json.dumps({"format": FORMAT, **asdict(score)}))

    assert [score.stage for score in read_scores(tmp_path)] == ["zulu", "alpha"]
    assert read_scores(tmp_path)[0].metrics == {"acc": (0.5, 0.5)}


def record_of(run, lines=None):
    """The record of a run, and a callback that fails the test on an unreadable file."""
    lines = lines or [{"kind": "train", "stage": stage, "step": 10} for stage in ("one", "two")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(run), pytest.fail


def kept_run(folder):
    """A run of two stages: two tasks of four samples, the second stage evaluated twice, and a continued prompt."""
    answers = {("one", 0, 10): [0, 0, 1, 1], ("two", 1, 5): [0, 0, 0, 0], ("two", 1, 8): [1, 1, 1, 1]}
    for (stage, number, steps), values in answers.items():
        place = folder / "evaluations" / stage / f"step-{steps:08d}"
        place.mkdir(parents=True)
        score = scored(values, stage=stage, stage_index=number, steps_done=steps)
        for task in ("piqa", "boolq"):
            made = replace(score, task=task)
            (place / file_name(task, 0, None)).write_text(json.dumps({"format": FORMAT, **asdict(made)}))
        texts = [{"prompt": "The dog", "continuation": f" at {steps}"}]
        told = {"stage": stage, "stage_index": number, "steps_done": steps, "texts": texts}
        (place / "generations.json").write_text(json.dumps(told))
    return folder


def test_a_report_shows_the_change_by_each_stage(tmp_path):
    """The last evaluation of a stage counts: 0.5 and then 1, d = (1, 1, 0, 0), error sqrt(1 / 12), p of z 1.7320508."""
    table = benchmark_table(*record_of(kept_run(tmp_path)))

    assert table.head[4:] == ["after one", "after two", "change from one to two"]
    assert [row[0] for row in table.rows] == ["boolq", "piqa"]
    assert table.rows[0][4:] == ["0.5000 ± 0.2887", "1.0000 ± 0.0000", "+0.5000 ± 0.2887 (p = 0.0833)"]
    assert benchmark_table(*record_of(tmp_path / "evaluations")) is None


def test_a_report_has_a_column_for_the_average_and_its_change_from_the_weights(tmp_path):
    """Of the same step only; the average of stage one is of another step than the weights' last score."""
    run = kept_run(tmp_path)
    for stage, index, steps in (("one", 0, 9), ("two", 1, 8)):
        change = {"stage": stage, "stage_index": index, "steps_done": steps, "average": True}
        folder = run / "evaluations" / stage / f"step-{steps:08d}@average"
        write_score(folder / file_name("piqa", 0, None), scored([0.0, 0.0, 1.0, 1.0], **change))
    table = benchmark_table(*record_of(run))

    assert table.head[4:8] == ["after one", "after one@average", "after two", "after two@average"]
    assert table.head[8:] == [
        "change from one to two",
        "change from one to one@average",
        "change from two to two@average",
    ]
    assert table.rows[1][5:8] == ["0.5000 ± 0.2887", "1.0000 ± 0.0000", "0.5000 ± 0.2887"]
    assert table.rows[1][9:] == ["", "-0.5000 ± 0.2887 (p = 0.0833)"]
    assert table.rows[0][7] == ""


def test_a_score_of_the_weights_is_written_as_before_averages(tmp_path):
    """Without the new key, so that older versions read it; an average's score has it and is read back."""
    for average in (False, True):
        write_score(tmp_path / f"{average}.json", scored([0.0, 1.0], average=average))

        assert ("average" in json.loads((tmp_path / f"{average}.json").read_text())) == average
        assert read_score(tmp_path / f"{average}.json").average == average


def test_a_report_shows_each_stages_continuation(tmp_path):
    """Of the same prompt, the last one of each stage, in order; a damaged file is reported and skipped."""
    run = kept_run(tmp_path)
    (prompt, text) = example_generations(*record_of(run))[0]
    (run / "evaluations/one/step-00000010/generations.json").write_text("{")
    record, said = record_of(run)[0], []
    (left,) = example_generations(record, said.append)

    assert prompt == "The dog"
    assert text == "after one (10 steps): The dog at 10\n\nafter two (8 steps): The dog at 8"
    assert left == ("The dog", "after two (8 steps): The dog at 8")
    assert len(said) == 1
    assert "generations.json: cannot be read" in said[0]


def test_a_score_that_cannot_be_read_does_not_end_the_report(tmp_path):
    """It is reported, and its task has no score after that stage."""
    run, said = kept_run(tmp_path), []
    (run / "evaluations/one/step-00000010" / file_name("piqa", 0, None)).write_text("{")
    table = benchmark_table(record_of(run)[0], said.append)

    assert [row[4] for row in table.rows] == ["0.5000 ± 0.2887", ""]
    assert len(said) == 1


def test_scores_of_a_stage_that_was_trained_again_are_excluded(tmp_path):
    """Stage two was removed after 8 steps and has 5 again: nothing after 8; a score after 5 counts by its files.

    A checkpoint that is there decides by its manifest; of one that was pruned the record knows the digest.
    """
    run = kept_run(tmp_path)
    event = {"kind": "event", "name": "checkpoint", "stage": "two", "step": 5}

    def shown(files):
        lines = [{"kind": "train", "stage": stage, "step": step} for stage, step in (("one", 10), ("two", 5))]
        return [row[4:6] for row in benchmark_table(*record_of(run, [*lines, event | {"files": files}])).rows]

    assert shown(SCORED_FILES) == [["0.5000 ± 0.2887", "0.0000 ± 0.0000"]] * 2
    assert shown("others") == [["0.5000 ± 0.2887"]] * 2
    files = {"format": 2, "stage": "two", "stage_index": 1, "steps_done": 5, "run_step": 15, "kind": "interval"}
    (run / "two" / "step-00000005").mkdir(parents=True)
    (run / "two" / "step-00000005" / "manifest.json").write_text(
        json.dumps({**files, "recipe": {}, "fingerprint": "", "data": {}, "files": {"x": {}}})
    )
    assert shown(SCORED_FILES) == [["0.5000 ± 0.2887"]] * 2


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 1}', json.dumps({"format": 7, **asdict(scored([0.0, 1.0]))})]
)
def test_a_damaged_score_is_reported(tmp_path, text):
    """With the file's name and what to do."""
    path = tmp_path / "piqa-0shot.json"
    path.write_text(text)

    with pytest.raises(DataError, match=r"piqa-0shot.json: .*Remove it"):
        read_score(path)
