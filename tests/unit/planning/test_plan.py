"""The plan: steps and disk space over all stages, the baseline of forgetting, and plans of trillions of tokens."""

import pytest
from plans import INFINITE, datasets, paper_batch, stage


def test_run_steps_and_disk_are_counted_over_the_stages(head, make):
    """100 steps before the second stage; two ends, one pre-anneal point, two kept and one being written are six."""
    plan = make(head + stage("a", "pile", 100, INFINITE) + stage("b", "german", 50))

    assert [plan.steps_before(stage) for stage in plan.stages] == [0, 100]
    assert plan.disk_bytes(2) == 6 * plan.spec.parameters * 12


def test_a_batch_of_a_stage_of_ten_trillion_tokens_is_found_at_once(head, make):
    """The last one, without going through the batches before it: new ordinals, and replay in proportion."""
    text = paper_batch(head) + stage("a", "pile", "10T") + stage("b", "german", "10T", replay="{ fraction = 0.05 }")
    plan = make(text)
    last = plan.batch(plan.stage("b"), plan.stage("b").steps - 1)
    sequences = plan.stage("b").steps * 1104

    assert len(last) == 1104
    assert max(draw.ordinal for draw in last if draw.replayed) == pytest.approx(sequences * 0.05, abs=2)
    assert max(draw.ordinal for draw in last if not draw.replayed) == pytest.approx(sequences * 0.95, abs=2)


def test_forgetting_is_counted_from_the_first_stage_without_the_dataset_as_new_data(head, make):
    """The first one after the last stage on the lineage in which the dataset was new; replay does not count as new."""
    five = {"replay": "{ fraction = 0.05 }"}
    plan = make(
        head
        + datasets("books")
        + stage("a", "pile", 100)
        + stage("b", "german", 100, **five)
        + stage("c", "books", 100, **five)
        + stage("d", "german", 100)
        + stage("e", "books", 100, init='"stage:b"')
        + stage("f", "books", 100, init='"checkpoint:x"')
        + stage("g", "books", 100)
    )
    since = {
        name: [plan.forgetting_since(plan.stage(name), dataset) for dataset in ("pile", "german", "books")]
        for name in "abcdefg"
    }

    assert since == {
        "a": [None, None, None],
        "b": ["b", None, None],
        "c": ["b", "c", None],
        "d": ["b", None, "d"],
        "e": ["b", "e", None],
        "f": ["f", "f", None],
        "g": ["f", "f", None],
    }
    assert plan.forgetting_since(plan.stage("c"), "german.web") == "c"
