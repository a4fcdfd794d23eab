"""Runs whose second stage warms up its optimizer state: signals, kills, bad batches, ranks.

German's schedule decays from its first step, so that its state before that step is saved: step-00000000.
"""

import json
import signal

import faulty
import pytest
import training
from faulty import BadNumbers
from training import Fault

import titan_cpt.train
from titan_cpt.distributed.float8 import local_values

pytestmark = training.THEIR_WARNINGS_IGNORED
SAVED = ["english/step-00000003", "german/step-00000000", "german/step-00000004", "german/step-00000008"]
STEP = "titan_cpt.train:Trainer.train_step"


@pytest.fixture
def raw(data, tmp_path):
    """Three steps of English, and eight of German after six passes at LR 0."""
    raw = training.two_stages(data, tmp_path)
    english, german = raw["stages"]
    english |= {"steps": 3, "lr": {"schedule": "constant", "max": 2e-3}}
    decay = {"schedule": "wsd", "max": 2e-3, "warmup_until": 0, "decay_from": 0, "decay": "linear"}
    german |= {"steps": 8, "optimizer_state": "warm:6", "lr": decay}
    return raw


def run(raw, name, *faults, ranks=1, **tables):
    """Start a run, or resume it; its folder and its outcome."""
    changed = training.changed(raw, **{**tables, "job": {"name": name}})
    path = training.write_config(changed, training.Path(raw["job"]["output_dir"]) / f"{name}.toml")
    return path.parent / name, faulty.train(path, faults=faults, ranks=ranks)


class BadInTraining:
    """Make the gradient of a step of German NaN, but not that of its pass in the warm-up."""

    def __init__(self, step):
        self.bad = BadNumbers("german", (step,))

    def lay(self):
        """Replace `Trainer.train_step`."""
        sound = titan_cpt.train.Trainer.train_step
        self.bad.lay()
        spoilt = titan_cpt.train.Trainer.train_step

        def step(trainer, loader, stage, number, *lr):
            return (sound if lr else spoilt)(trainer, loader, stage, number, *lr)

        titan_cpt.train.Trainer.train_step = step


class Terminated:
    """SIGTERM to this process at a call of `Trainer.train_step`."""

    def __init__(self, call):
        self.call = call

    def lay(self):
        """Replace `Trainer.train_step`."""
        original, calls = titan_cpt.train.Trainer.train_step, [0]

        def signalling(*arguments):
            calls[0] += 1
            if calls[0] == self.call:
                signal.raise_signal(signal.SIGTERM)
            return original(*arguments)

        titan_cpt.train.Trainer.train_step = signalling


class NegativeZeros:
    """Make the first weight of every shard -0.0 when German begins."""

    def lay(self):
        """Replace `begin_stage`."""
        original = titan_cpt.train.begin_stage

        def planting(state, stage):
            done = original(state, stage)
            if stage.name == "german":
                for weight in state.model.parameters():
                    local_values(weight).view(-1)[0] = -0.0
            return done

        titan_cpt.train.begin_stage = planting


def assert_same(run, other):
    """The numbers, the checkpoints, and the bits of the last one and of the one before German's first step."""
    assert training.numbers_of(run) == training.numbers_of(other)
    assert training.checkpoints_of(run) == training.checkpoints_of(other)
    for step in (0, 8):
        for part in ("model", "optimizer"):
            tensors = [training.tensors_of(one / "german" / f"step-{step:08}", part) for one in (run, other)]
            assert training.same_bits(*tensors)


def test_a_warm_up_that_a_signal_or_a_kill_ends_is_done_again(raw):
    """SIGTERM at the third pass, then kill -9 at the fifth: nothing of German is saved; the third start does it all."""
    whole, outcome = run(raw, "whole")
    folder, stopped = run(raw, "broken", Terminated(3 + 3))
    _, killed = run(raw, "broken", Fault(STEP, 5))
    between = training.checkpoints_of(folder)
    _, last = run(raw, "broken")

    assert outcome.status == 0, outcome.output
    assert (stopped.status, killed.status, last.status) == (75, -signal.SIGKILL, 0), last.output
    assert "stopped by SIGTERM; everything is saved" in stopped.output
    assert between == SAVED[:1]
    assert_same(folder, whole)
    # What is saved before German's first step: English's weights, and moments of six steps. No pass has a line.
    before = whole / SAVED[1]
    assert training.checkpoints_of(whole) == SAVED
    assert training.same_bits(training.tensors_of(before), training.tensors_of(whole / SAVED[0]))
    counts = [value for name, value in training.tensors_of(before, "optimizer").items() if name.endswith(".step")]
    assert {count.item() for count in counts} == {6.0}
    assert [line["step"] for line in training.lines_of(whole, "train")] == [*range(1, 4), *range(1, 9)]
    assert [event["passes"] for event in training.events_of(whole, "warm_up")] == [6]
    assert "optimizer warm-up: 6 of 6 passes, loss" in outcome.output


def test_a_bad_batch_stops_a_warm_up_with_one_message(raw):
    """By default; no checkpoint of the stage is written, and the run can be started again."""
    folder, outcome = run(raw, "run", BadNumbers("german", (2,)))

    assert outcome.status == 1
    assert "stage german, warm-up of the optimizer state on the batch of step 2 (counted from 0): " in outcome.output
    assert "no weight has changed" in outcome.output
    assert "Traceback" not in outcome.output
    assert training.checkpoints_of(folder) == SAVED[:1]


def test_a_batch_that_is_bad_in_a_warm_up_is_skipped_there_and_in_training(raw, tmp_path):
    """The moments are those of five passes. A kill before the first checkpoint, and a fault that does not return,
    change nothing."""
    skip = {"on_nonfinite": "skip"}
    whole, outcome = run(raw, "whole", BadNumbers("german", (2,)), training=skip)
    ray = BadNumbers("german", (2,), once=str(tmp_path / "ray"))
    _, killed = run(raw, "killed", ray, Fault(STEP, 3 + 5), training=skip)
    folder, last = run(raw, "killed", training=skip)

    assert (outcome.status, killed.status, last.status) == (0, -signal.SIGKILL, 0), last.output
    skipped = json.loads((whole / "german" / "skipped.json").read_text())
    assert list(skipped) == ["2"]
    assert skipped["2"]["in_warm_up"]
    moments = training.tensors_of(whole / SAVED[1], "optimizer")
    assert {value.item() for name, value in moments.items() if name.endswith(".step")} == {5.0}
    assert_same(folder, whole)


def test_a_rollback_to_the_beginning_of_the_stage_warms_up_again(raw):
    """A bad step of training before the stage's first checkpoint, whose batch was good in the warm-up: it counts there
    in both. The repeated warm-up gives the same state, also if a signal ends it and another session repeats it."""
    bad, lr = BadInTraining(1), {"schedule": "constant", "max": 2e-3}
    raw["stages"][1]["lr"] = lr  # without a checkpoint before the first step
    rolling, outcome = run(raw, "rolling", bad, training={"on_nonfinite": "rollback"})
    skipping, _ = run(raw, "skipping", bad, training={"on_nonfinite": "skip"})
    second_warm_up = 3 + 6 + 2 + 3
    stopped, halted = run(raw, "stopped", bad, Terminated(second_warm_up), training={"on_nonfinite": "rollback"})
    between = training.checkpoints_of(stopped)
    _, last = run(raw, "stopped", training={"on_nonfinite": "rollback"})

    assert (outcome.status, halted.status, last.status) == (0, 75, 0), outcome.output + last.output
    assert between == SAVED[:1]
    assert [len(training.events_of(one, "warm_up")) for one in (rolling, skipping)] == [2, 1]
    for other in (rolling, stopped):
        assert training.numbers_of(other) == training.numbers_of(skipping)
        for part in ("model", "optimizer"):
            ends = [training.tensors_of(one / "german" / "step-00000008", part) for one in (other, skipping)]
            assert training.same_bits(*ends)


def test_two_ranks_with_sharded_bfloat16_weights_warm_up_without_changing_a_bit(raw):
    """FSDP2, weight decay, clipping: the moments of both halves of each batch."""
    tables = {"training": {"mixed_precision_param": "bfloat16", "max_norm": 0.1}, "optimizer": {"weight_decay": 0.5}}
    folder, outcome = run(raw, "ranks", NegativeZeros(), ranks=2, **tables)

    assert outcome.status == 0, outcome.output
    before, after = (training.tensors_of(folder / saved) for saved in SAVED[:2])
    for name, weight in after.items():
        planted = (weight == 0) & weight.signbit()
        assert planted.sum() == 2, name  # one of each rank
        assert weight[~planted].equal(before[name][~planted])
    moments = training.tensors_of(folder / SAVED[1], "optimizer")
    assert {value.item() for name, value in moments.items() if name.endswith(".step")} == {6.0}
