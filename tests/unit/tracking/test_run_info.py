"""What is read from a run's folder besides its metrics."""

import json

import pytest

from titan_cpt.tracking.run_info import end_state, final_values, flat, last_start


def test_flat_keys_are_dotted_and_nulls_are_omitted():
    """Lists stay values."""
    assert dict(flat({"a": {"b": {"c": 1}, "d": None}, "e": [1, 2]})) == {"a.b.c": 1, "e": [1, 2]}


@pytest.mark.parametrize(
    ("done", "last", "state"),
    [
        (True, {"kind": "event", "name": "checkpoint"}, "finished"),
        (False, {"kind": "event", "name": "stop", "signal": "SIGTERM"}, "stopped"),
        (False, {"kind": "event", "name": "stop", "why": "the loss is not finite"}, "failed"),
        (False, {"kind": "train"}, "failed"),
    ],
)
def test_how_a_run_ended(tmp_path, done, last, state):
    """Complete; stopped by a signal; or anything else, such as a kill."""
    (tmp_path / "summary.json").write_text(json.dumps({"stages": [{"is_done": True}, {"is_done": done}]}))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train"}) + "\n" + json.dumps(last) + "\n")

    assert end_state(tmp_path) == state


def test_final_values_are_the_losses_after_each_stage(tmp_path):
    """By stage, dataset and kind."""
    stage = {"name": "de", "after": {"en": 2.0, "de": 1.0}, "forgetting": {"en": 0.5}, "adaptation": {"de": 1.0}}
    (tmp_path / "summary.json").write_text(json.dumps({"stages": [stage]}))

    assert final_values(tmp_path) == {
        "final/de/en/after": 2.0,
        "final/de/de/after": 1.0,
        "final/de/en/forgetting": 0.5,
        "final/de/de/adaptation": 1.0,
    }


def test_the_start_of_this_session_is_found_after_those_of_earlier_ones(tmp_path):
    """Empty until this session has written it."""
    first = json.dumps({"kind": "event", "name": "start", "world_size": 1}) + "\n"
    second = json.dumps({"kind": "event", "name": "start", "world_size": 2}) + "\n"
    path = tmp_path / "metrics.jsonl"
    path.write_text(first)
    assert last_start(tmp_path)["world_size"] == 1
    assert last_start(tmp_path, len(first)) == {}
    path.write_text(first + second)
    assert last_start(tmp_path, len(first))["world_size"] == 2
