"""What is due after a step, by hand: a pure function, so no run is needed."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.training.due import ActionsDue, actions_due, benchmarks_due, checkpoint_due


def config(*, log_freq=10, validation=20, checkpoint=30, gc_freq=50, suite=None, every=None, at_stage_end=True):
    return SimpleNamespace(
        metrics=SimpleNamespace(log_freq=log_freq),
        validation=SimpleNamespace(interval=validation),
        checkpoint=SimpleNamespace(interval=checkpoint),
        training=SimpleNamespace(gc_freq=gc_freq),
        evaluation=SimpleNamespace(suite=suite, every=every, at_stage_end=at_stage_end),
    )


def stage(*, steps=100, pre_anneal=None, final_window=(), copies=()):
    return SimpleNamespace(
        steps=steps, pre_anneal_step=pre_anneal, final_window=final_window, copies_due=lambda step: step in copies
    )


NOTHING = ActionsDue(
    log=False, copies=False, validation=False, checkpoint=None, benchmarks=False, garbage_collection=False, stop=False
)


@pytest.mark.parametrize(
    ("steps_done", "due"),
    [
        (2, {}),
        (10, {"log": True}),
        (20, {"log": True, "validation": True}),
        (30, {"log": True, "checkpoint": "interval"}),
        (51, {"garbage_collection": True}),  # after the step with index 50
        (60, {"log": True, "validation": True, "checkpoint": "interval"}),
        (97, {"log": True, "validation": True}),  # in the final window
        (100, {"log": True, "validation": True, "checkpoint": "stage_end"}),
    ],
)
def test_intervals_count_the_steps_done(steps_done, due):
    """Logging, validation and checkpoints at multiples of their intervals; all of them at the stage's end."""
    found = actions_due(config(), stage(final_window=(97, 98, 99)), steps_done, stop=False)

    assert vars(found) == {**vars(NOTHING), **due}


def test_the_last_step_before_annealing_has_a_checkpoint_of_its_own_kind():
    """Even where an interval checkpoint is due at the same step; the stage's end takes precedence over both."""
    assert actions_due(config(), stage(pre_anneal=30), 30, stop=False).checkpoint == "pre_anneal"
    assert actions_due(config(), stage(pre_anneal=47), 47, stop=False).checkpoint == "pre_anneal"
    assert checkpoint_due(config(), stage(steps=30, pre_anneal=30), 30) == "stage_end"


def test_metrics_are_read_before_a_copy_of_the_weights_is_taken():
    """They tell whether a step before was bad."""
    assert vars(actions_due(config(), stage(copies=(7,)), 7, stop=False)) == {
        **vars(NOTHING),
        "log": True,
        "copies": True,
    }


def test_a_stop_saves_a_checkpoint_at_any_step():
    """And writes the metrics first."""
    found = actions_due(config(), stage(), 7, stop=True)

    assert (found.stop, found.checkpoint, found.log, found.validation) == (True, "interval", True, False)


def test_benchmarks_have_a_checkpoint_to_run_on():
    """They run on the checkpoint of their step, so one is saved there."""
    found = actions_due(config(suite="minimal_pairs", every=7), stage(), 7, stop=False)

    assert (found.benchmarks, found.checkpoint) == (True, "interval")
    assert not benchmarks_due(config(suite="minimal_pairs", every=7), stage(), 0)
    assert not benchmarks_due(config(suite=None, every=7), stage(), 7)
    assert not benchmarks_due(config(suite="minimal_pairs", at_stage_end=False), stage(), 100)
    assert benchmarks_due(config(suite="minimal_pairs"), stage(), 100)


@given(
    steps=st.integers(1, 300),
    intervals=st.tuples(*[st.integers(1, 50)] * 4),
    pre_anneal=st.none() | st.integers(1, 300),
    stop=st.booleans(),
    data=st.data(),
)
def test_metrics_are_always_logged_before_anything_is_measured_or_saved(steps, intervals, pre_anneal, stop, data):
    """Else a bad step could reach a checkpoint: the host sees it when it logs."""
    log_freq, validation, checkpoint, gc_freq = intervals
    chosen = config(log_freq=log_freq, validation=validation, checkpoint=checkpoint, gc_freq=gc_freq)
    steps_done = data.draw(st.integers(1, steps))

    found = actions_due(chosen, stage(steps=steps, pre_anneal=pre_anneal), steps_done, stop=stop)

    assert found.log or not (found.validation or found.checkpoint or found.benchmarks)
    assert found.checkpoint is not None or not found.stop
