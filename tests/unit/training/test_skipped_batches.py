"""Skipped batches: recorded on disk, recalled from manifests, counted in windows of steps."""

import json

import pytest

from titan_cpt.errors import CheckpointError
from titan_cpt.training.skipped_batches import SkippedBatches


def test_a_skipped_batch_is_on_the_disk_at_once(tmp_path):
    """Sorted by step, with its details; another session reads it, and a rank that does not write leaves no file."""
    SkippedBatches(tmp_path, writing=False).add("first", 1, why="spike")
    assert not (tmp_path / "first").exists()

    skipped = SkippedBatches(tmp_path, writing=True)
    skipped.add("first", 7, why="the loss is nan")
    skipped.add("first", 3, why="spike")
    stored = json.loads((tmp_path / "first" / "skipped.json").read_text())
    again = SkippedBatches(tmp_path, writing=False)

    assert list(stored.items()) == [("3", {"why": "spike"}), ("7", {"why": "the loss is nan"})]
    assert [step for step in range(9) if again.contains("first", step)] == [3, 7]
    assert not again.contains("second", 3)


def test_a_manifest_lists_the_skips_that_its_weights_went_through(tmp_path):
    """All of earlier stages, and of the last one those before its step."""
    skipped = SkippedBatches(tmp_path, writing=False)
    skipped.restore({"first": [9, 2], "second": [4, 5]})
    skipped.restore(None)

    assert skipped.skipped_before(["first", "second"], 5) == {"first": [2, 9], "second": [4]}
    assert skipped.skipped_before(["first", "second"], 4) == {"first": [2, 9]}
    assert skipped.skipped_before(["first"], 10) == {"first": [2, 9]}


def test_a_restored_step_keeps_the_details_of_the_file(tmp_path):
    """The manifest has only the number."""
    skipped = SkippedBatches(tmp_path, writing=True)
    skipped.add("first", 3, why="spike")
    skipped.restore({"first": [3]})
    skipped.add("first", 4, why="spike")

    assert json.loads((tmp_path / "first" / "skipped.json").read_text())["3"] == {"why": "spike"}


def test_skips_are_counted_after_one_step_until_another(tmp_path):
    """The first step is excluded, the last included."""
    skipped = SkippedBatches(tmp_path, writing=False)
    skipped.restore({"first": [3, 5, 8]})

    assert skipped.count("first", after=3, until=8) == 2
    assert skipped.count("first", after=2, until=7) == 2
    assert skipped.count("second", after=0, until=9) == 0


@pytest.mark.parametrize("content", ["", "[]", '{"three": {}}'])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, content):
    """And says what to restore or remove."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "skipped.json").write_text(content)

    with pytest.raises(CheckpointError, match=r"first.skipped\.json: cannot be read: .* restore it, or remove it"):
        SkippedBatches(tmp_path, writing=False)
