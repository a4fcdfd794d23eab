"""Bad numbers: the run stops, skips the batch or rolls back, as configured, and a kill in between changes nothing."""

import json
import signal

import faulty
import pytest
import torch
import training
from faulty import BadNumbers
from training import Fault

from titan_cpt.checkpoint import manifest
from titan_cpt.errors import CheckpointError
from titan_cpt.reporting.run_log import read_run
from titan_cpt.reporting.summary import summarize
from titan_cpt.training.optimization.adamw import build_adamw
from titan_cpt.training.optimization.update import UpdateGuard
from titan_cpt.training.skipped_batches import SkippedBatches

pytestmark = training.THEIR_WARNINGS_IGNORED

SPIKES = {"on_loss_spike": "skip", "loss_spike_window": 4, "loss_spike_z_score": 8.0}


@pytest.fixture
def raw(data, tmp_path):
    """Two stages, logged and validated every fifth step."""
    return training.changed(training.two_stages(data, tmp_path), metrics={"log_freq": 5})


def run(raw, name, *faults, ranks=1, **tables):
    """Train a run to its end; return its folder and its outcome."""
    changed = training.changed(raw, **{**tables, "job": {"name": name}})
    folder = training.Path(raw["job"]["output_dir"])
    outcome = faulty.train(training.write_config(changed, folder / f"{name}.toml"), faults=faults, ranks=ranks)
    return folder / name, outcome


def losses_of(run):
    """Loss by (stage, step), as it counts in the end."""
    found = {key[1:3]: value for key, value in training.numbers_of(run).items() if key[0] == "train"}
    return {key: value[0] for key, value in found.items()}


def skipped_of(run, stage="english"):
    path = run / stage / "skipped.json"
    return json.loads(path.read_text()) if path.exists() else {}


def end_of(run):
    return training.tensors_of(run / "german" / "step-00000010")


@pytest.mark.parametrize("kind", ["nan gradient", "spike"])
def test_a_skipped_batch_changes_no_weight_and_the_next_steps_are_trained(raw, kind):
    """Steps 6 and 7 of English, checked when step 8 is saved. Their lines have no loss; the LR schedule continues."""
    training_table = {"on_nonfinite": "skip", **SPIKES}
    skipping, outcome = run(raw, "skipping", BadNumbers("english", (6, 7), kind), training=training_table)
    sound, _ = run(raw, "sound", training=training_table)
    lines = {(line["stage"], line["step"]): line for line in training.lines_of(skipping, "train")}
    before, after = losses_of(sound), losses_of(skipping)

    assert outcome.status == 0, outcome.output
    assert list(skipped_of(skipping)) == ["6", "7"]
    assert [after["english", step] == before["english", step] for step in range(1, 7)] == [True] * 6
    assert [after["english", step] for step in (7, 8)] == [None, None]
    assert all(after["english", step] not in (None, before["english", step]) for step in (10, 11, 12))
    assert {key for key, line in lines.items() if line.get("skipped")} == {("english", 7), ("english", 8)}
    assert lines["english", 7]["lr"] == next(
        line["lr"] for line in training.lines_of(sound, "train") if (line["stage"], line["step"]) == ("english", 7)
    )
    assert {e["step"] for e in training.events_of(skipping, "skip_batch")} == {7, 8}


def test_the_skipped_batches_do_not_depend_on_the_logging_interval(raw):
    """Losses are checked after every step, or only before a save: the same bits."""
    bad, table = BadNumbers("english", (2, 10)), {"on_nonfinite": "skip"}
    often, first = run(raw, "often", bad, training=table, metrics={"log_freq": 1})
    rarely, second = run(raw, "rarely", bad, training=table, metrics={"log_freq": 1000})

    assert (first.status, second.status) == (0, 0), first.output + second.output
    assert training.numbers_of(often) == training.numbers_of(rarely)
    assert training.same_bits(end_of(often), end_of(rarely))


def test_a_skip_is_a_step_without_an_update(raw):
    """Adam's own step count is two behind; the data and the schedule are not."""
    folder, _ = run(raw, "run", BadNumbers("english", (3, 4)), training={"on_nonfinite": "skip"})
    counts = {
        value.item()
        for name, value in training.tensors_of(folder / "english" / "step-00000009", "optimizer").items()
        if name.endswith(".step")
    }
    hashes = [line["batch_hash"] for line in training.lines_of(folder, "train")]

    assert counts == {7.0}
    assert len(set(hashes)) == 22
    assert manifest.read(folder / "english" / "step-00000009")["skipped"] == {"english": [3, 4]}
    assert manifest.read(folder / "german" / "step-00000010")["skipped"] == {"english": [3, 4]}


def test_the_sequences_of_a_skipped_batch_are_named(raw):
    """Which source, which window: enough to look at the text. The hash is that of the record."""
    folder, _ = run(raw, "run", BadNumbers("german", (5,)), training={"on_nonfinite": "skip"})
    told = skipped_of(folder, "german")["5"]
    hashes = {(line["stage"], line["step"]): line["batch_hash"] for line in training.lines_of(folder, "train")}

    assert "gradient norm nan" in told["why"]
    assert sorted(source for source, _ in told["sequences"]) == ["de", "de", "de", "en"]
    assert told["batch_hash"] == hashes["german", 6]


def test_rolling_back_takes_the_steps_since_the_checkpoint_again(raw):
    """A checkpoint after step 4, a bad number at step 6: steps 4 and 5 are repeated with the same numbers."""
    folder, outcome = run(raw, "rolling", BadNumbers("english", (6,)), training={"on_nonfinite": "rollback"})
    skipping, _ = run(raw, "skipping", BadNumbers("english", (6,)), training={"on_nonfinite": "skip"})

    assert outcome.status == 0, outcome.output
    assert [(e["stage"], e["step"]) for e in training.events_of(folder, "resume")] == [("english", 4)]
    assert [line["step"] for line in read_run(folder).trains] == [*range(1, 13), *range(1, 11)]
    assert training.numbers_of(folder) == training.numbers_of(skipping)
    assert training.same_bits(end_of(folder), end_of(skipping))


def test_rolling_back_before_the_first_checkpoint_begins_the_stage_again(raw):
    """Step 2, and step 1 of German, whose stage began from a checkpoint of English."""
    bad = (BadNumbers("english", (2,)), BadNumbers("german", (1,)))
    folder, outcome = run(raw, "rolling", *bad, training={"on_nonfinite": "rollback"})
    skipping, _ = run(raw, "skipping", *bad, training={"on_nonfinite": "skip"})

    assert outcome.status == 0, outcome.output
    assert len(training.events_of(folder, "transition")) == 4
    assert training.same_bits(end_of(folder), end_of(skipping))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_batch_skipped_for_a_fault_that_does_not_return_is_still_skipped_after_a_kill(raw, tmp_path, policy):
    """A cosmic ray at step 5; kill -9 right after the skip, before the next checkpoint; the same command."""
    table = {"on_nonfinite": policy}
    whole, _ = run(raw, "whole", BadNumbers("english", (5,)), training=table)
    ray = BadNumbers("english", (5,), once=str(tmp_path / "ray"))
    _, killed = run(
        raw, "killed", ray, Fault("titan_cpt.training.optimization.update:UpdateGuard.reset"), training=table
    )
    folder, outcome = run(raw, "killed", ray, training=table)

    assert killed.status == -signal.SIGKILL
    assert outcome.status == 0, outcome.output
    assert training.numbers_of(folder) == training.numbers_of(whole)
    assert training.same_bits(end_of(folder), end_of(whole))


def test_a_manifest_keeps_its_skips_without_the_stages_file(raw):
    """skipped.json is gone: later manifests still list the skips that the checkpoint's own manifest lists."""
    table = {"on_nonfinite": "skip"}
    saved = training.Path(raw["job"]["output_dir"]) / "run" / "english" / "step-00000008"
    fault = Fault("titan_cpt.train:Trainer.train_step", 12, saved)
    folder, killed = run(raw, "run", BadNumbers("english", (5,)), fault, training=table)
    (folder / "english" / "skipped.json").unlink()
    _, outcome = run(raw, "run", training=table)

    assert killed.status == -signal.SIGKILL
    assert outcome.status == 0, outcome.output
    assert manifest.read(folder / "german" / "step-00000010")["skipped"] == {"english": [5]}


def test_a_spike_is_logged_and_trained_on_by_default(raw):
    """The default; the message has the step, the score and the window."""
    table = {"loss_spike_window": 4}
    folder, outcome = run(raw, "run", BadNumbers("english", (8,), "spike"), training=table)
    spikes = training.events_of(folder, "loss_spike")

    assert outcome.status == 0, outcome.output
    assert [(event["stage"], event["step"]) for event in spikes] == [("english", 9)]
    assert spikes[0]["z_score"] > 8
    assert "loss spike: " in outcome.output
    assert losses_of(folder)["english", 9] > 1.05 * losses_of(folder)["english", 8]


def test_the_window_of_losses_survives_a_kill(raw):
    """A kill after the window is full and before the spike: the losses in the manifest still detect it."""
    bad = BadNumbers("english", (9,), "spike")
    whole, _ = run(raw, "whole", bad, training=SPIKES)
    saved = training.Path(raw["job"]["output_dir"]) / "killed" / "english" / "step-00000008"
    _, killed = run(raw, "killed", bad, Fault("titan_cpt.train:Trainer.train_step", 10, saved), training=SPIKES)
    folder, outcome = run(raw, "killed", bad, training=SPIKES)

    assert killed.status == -signal.SIGKILL
    assert outcome.status == 0, outcome.output
    assert list(skipped_of(folder)) == list(skipped_of(whole)) == ["9"]
    assert training.numbers_of(folder) == training.numbers_of(whole)


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_spike_may_stop_be_skipped_or_rolled_back(raw, policy):
    """The batch never reaches the weights; stopping saves those of the step before."""
    table = {**SPIKES, "on_loss_spike": policy}
    folder, outcome = run(raw, "run", BadNumbers("english", (6,), "spike"), training=table)

    if policy == "stop":
        assert outcome.status == 1
        assert "stage english, step 6 (counted from 0): the loss is" in outcome.output
        assert 'training.on_loss_spike = "skip"' in outcome.output
        assert training.checkpoints_of(folder)[-1] == "english/step-00000006"
        assert summarize(folder)["stages"][0]["steps_done"] == 6  # more are logged, which were held back
    else:
        assert outcome.status == 0, outcome.output
        assert list(skipped_of(folder)) == ["6"]


def test_more_skips_than_allowed_stop_the_run(raw):
    """Two batches are skipped, the third stops the run with the weights of the step before; the message counts them."""
    table = {"on_nonfinite": "skip", "max_skips_per_1000_steps": 2}
    folder, outcome = run(raw, "run", BadNumbers("english", (3, 5, 7)), training=table)

    assert outcome.status == 1
    assert "2 batches of the 1000 steps before it were skipped" in outcome.output
    assert training.checkpoints_of(folder)[-1] == "english/step-00000007"
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("kind", ["nan gradient", "spike"])
def test_a_bad_number_on_one_of_four_ranks_makes_every_rank_skip_the_step(raw, ranks, kind):
    """Only the last rank has a bad gradient or far too high a loss: every rank skips the step, none hangs."""
    bad = BadNumbers("english", (6,), kind, rank=ranks - 1)
    small = {"local_batch_size": 1, "on_nonfinite": "skip", **SPIKES}
    folder, outcome = run(raw, "run", bad, ranks=ranks, training=small)

    assert outcome.status == 0, outcome.output
    assert list(skipped_of(folder)) == ["6"]
    assert len(losses_of(folder)) == 22


def small_guard(**options):
    weight = torch.nn.Linear(2, 2)
    return UpdateGuard(build_adamw(weight, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0), **options)


def observed(guard, loss):
    return [float(value) for value in guard.observe(torch.tensor(loss), torch.tensor(1.0))]


def test_the_score_is_that_of_the_window_before_by_hand():
    """Losses 1, 2, 3, 4: mean 2.5, deviation sqrt(1.25). The fifth, 5, has z-score 2.2361; the window moves."""
    guard = small_guard(spike_window=4)
    first = [observed(guard, loss) for loss in (1.0, 2.0, 3.0, 4.0)]
    fifth = observed(guard, 5.0)

    assert all(score != score for _, score in first)
    assert fifth == [0.0, pytest.approx(2.5 / 1.25**0.5, rel=1e-6)]
    assert guard.recent_losses() == [2.0, 3.0, 4.0, 5.0]


def test_the_loss_of_a_skipped_batch_does_not_enter_the_window():
    """Nor do the next ones until the reset, since the weights are frozen."""
    guard = small_guard(spike_window=4, spike_z_score=3.0)
    for loss in (1.0, 2.0, 1.0, 2.0):
        observed(guard, loss)
    high, after = observed(guard, 9.0), observed(guard, 1.5)
    kept = guard.recent_losses()
    guard.reset()
    low = observed(guard, 0.0)

    assert (high[0], after[0], low[0]) == (1.0, 1.0, 0.0)
    assert kept == [1.0, 2.0, 1.0, 2.0]


def test_losses_are_recalled_as_they_were_noted():
    """Fewer than the window, and more than a window that was made shorter since."""
    guard = small_guard(spike_window=3)
    guard.restore_losses([1.5, 2.5])
    few = guard.recent_losses()
    guard.restore_losses([0.1, 1.0, 2.0, 3.0])

    assert few == [1.5, 2.5]
    assert guard.recent_losses() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}', "\udcff"])
def test_a_damaged_list_of_skips_is_reported(tmp_path, content):
    """No traceback, and what to do about it."""
    (tmp_path / "english").mkdir()
    (tmp_path / "english" / "skipped.json").write_text(content, errors="surrogateescape")

    with pytest.raises(CheckpointError, match=r"english/skipped.json: cannot be read"):
        SkippedBatches(tmp_path, writing=False)


def test_skips_are_counted_within_the_given_steps(tmp_path):
    """After 10 and until 20: 11, 20, and not 10 or 21."""
    (tmp_path / "a").mkdir()
    skips = SkippedBatches(tmp_path, writing=True)
    for step in (10, 11, 20, 21):
        skips.add("a", step)

    assert skips.count("a", after=10, until=20) == 2
    assert skips.skipped_before(["a"], 20) == {"a": [10, 11]}
    assert SkippedBatches(tmp_path, writing=False).skipped_before(["a", "b"], 5) == {"a": [10, 11, 20, 21]}
