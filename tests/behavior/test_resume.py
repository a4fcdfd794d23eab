"""The promise: the same bytes, or a refusal that names the difference. Runs are killed, damaged, edited and compared.

All in fp32 with one process and one thread, where equal means equal to the last bit.
"""

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import Fault, Process, train

from titan_cpt.checkpoint import manifest
from titan_cpt.evaluation.checkpoint_paths import stage_ends
from titan_cpt.reporting.summary import summarize
from titan_cpt.training.metrics import MetricsLog

pytestmark = training.THEIR_WARNINGS_IGNORED


def assert_same(run, unbroken):
    """Every number of every step and measurement, and the weights and moments at the stages' ends."""
    expected, found = training.numbers_of(unbroken), training.numbers_of(run)

    assert found.keys() == expected.keys()
    assert {key: value for key, value in found.items() if value != expected[key]} == {}
    for name in ("english/step-00000009", "english/step-00000012", "german/step-00000010"):
        for part in ("model", "optimizer"):
            assert training.same_bits(
                training.tensors_of(run / name, part), training.tensors_of(unbroken / name, part)
            ), name


def points_of(run, tag):
    """Step and value of every point of a curve, as TensorBoard reads it."""
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def damage(run, folder, kind):
    """Damage a checkpoint in one of several ways."""
    shard = next((run / folder).glob("*.safetensors"))
    if kind == "flipped byte":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 0x80
        shard.write_bytes(content)
    elif kind == "truncated shard":
        os.truncate(shard, shard.stat().st_size // 2)
    elif kind == "missing shard":
        shard.unlink()
    elif kind == "garbage manifest":
        (run / folder / "manifest.json").write_text('{"format": 1')
    else:
        (run / folder / "manifest.json").unlink()


def test_the_unbroken_run_is_whole(unbroken):
    """What the others are compared with: 12 + 10 steps, both datasets at 0, 5, 10 and the ends."""
    numbers = training.numbers_of(unbroken)

    assert len([key for key in numbers if key[0] == "train"]) == 22
    assert len([key for key in numbers if key[0] == "validation"]) == 2 * (4 + 3)


def test_a_second_run_from_the_start_gives_the_same_bits(config, unbroken, tmp_path):
    """A forked process and a separate interpreter give equal bits, which the other tests rely on."""
    outcome = train(config)

    assert outcome.status == 0, outcome.output
    assert_same(tmp_path / "run", unbroken)


KILLS = (
    Fault("torch.optim:AdamW.step", 2),  # before anything was saved
    Fault("titan_cpt.checkpoint.storage:ShardWriter.write_data", 1),  # in the first save, before a byte
    Fault("titan_cpt.checkpoint.manifest:write", 1),  # shards there, manifest not
    Fault("titan_cpt.training.validation:Validator._loss", 4),  # between the datasets of a measurement
    Fault("titan_cpt.checkpoint.manifest:write_text_atomically", 3),  # all is hashed, the manifest has no name yet
    Fault("titan_cpt.train:write_summary", 1),  # the stage's end is reached, the next stage not begun
    Fault(
        "titan_cpt.training.stage_start:load_state", 1
    ),  # on resume, or in the transition if the stage's end was sealed in time
    Fault("titan_cpt.train:Trainer.train_step", 3),
    Fault("titan_cpt.checkpoint.manifest:remove", 2),  # while an old checkpoint is pruned or a new folder is made
    Fault("titan_cpt.train:Trainer.stage_steps", 1),  # right after a resume
)


def test_a_run_killed_again_and_again_ends_with_the_numbers_of_an_unbroken_one(config, unbroken, tmp_path):
    """kill -9 at ten chosen moments, one after another in one run: in saves, in validation, between two stages."""
    statuses = [train(config, fault=fault).status for fault in KILLS]
    last = train(config)

    assert statuses == [-signal.SIGKILL] * 10
    assert last.status == 0, last.output
    assert_same(tmp_path / "run", unbroken)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_numbers_of_an_unbroken_one(config, unbroken, tmp_path, seed):
    """kill -9 from outside, after a random number of further lines in the record, until a run resumed in mid-stage."""
    rng, run, killed, resumed = random.Random(seed), tmp_path / "run", 0, 0
    while not resumed and killed < 12:
        process = Process(config)
        seen = len(training.lines_of(run)) + rng.randint(5, 16)
        process.wait_for(lambda seen=seen: len(training.lines_of(run)) >= seen, ended_will_do=True)
        process.send(signal.SIGKILL)
        if process.end().status == 0:
            break
        killed += 1
        resumed = len(training.events_of(run, "resume"))
    last = train(config)

    assert killed >= 2
    assert resumed
    assert last.status == 0, last.output
    assert_same(run, unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_75_and_the_same_command_resumes(config, unbroken, tmp_path, number):
    """The checkpoint is of the last step in the record, wherever that was; no step is trained twice."""
    run = tmp_path / "run"
    process = Process(config)
    process.wait_for(lambda: len(training.lines_of(run, "train")) >= 2)
    process.send(number)
    stopped = process.end()
    taken = training.lines_of(run, "train")
    newest = training.checkpoints_of(run)[-1]
    last = train(config)

    assert stopped.status == 75, stopped.output
    assert f"stopped by {number.name}" in stopped.output
    assert newest == f"{taken[-1]['stage']}/step-{taken[-1]['step']:08d}"
    assert training.events_of(run, "stop")[0]["signal"] == number.name
    assert last.status == 0, last.output
    assert len(training.lines_of(run, "train")) == 22
    assert_same(run, unbroken)


def test_a_finished_run_is_skipped_and_ends_with_0(ended, config, unbroken):
    """Nothing is trained, and the files of the run stay unchanged."""
    outcome = train(config)

    assert outcome.status == 0, outcome.output
    assert "already trained, skipped" in outcome.output
    assert len(training.lines_of(ended, "train")) == 22
    assert_same(ended, unbroken)


def test_only_an_appended_stage_is_trained_and_gives_the_numbers_of_a_run_that_always_had_it(
    ended, raw, config, data, tmp_path
):
    """Two stages done, a third is written into the file; against a run that had three from the start."""
    three = training.changed(raw, stages=[*raw["stages"], training.third_stage()])
    training.write_config(three, config)
    appended = train(config)
    whole_config = training.write_config(training.changed(three, job={"name": "whole"}), tmp_path / "whole.toml")
    whole = train(whole_config)
    again = [line["step"] for line in training.lines_of(ended, "train")[22:]]

    assert (appended.status, whole.status) == (0, 0), appended.output
    assert again == [1, 2, 3, 4, 5]
    assert training.numbers_of(ended) == training.numbers_of(tmp_path / "whole")


DAMAGES = ("flipped byte", "truncated shard", "missing shard", "garbage manifest", "missing manifest")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(ended, config, unbroken, kind):
    """German's end is gone and step 8 damaged: the run says so, resumes after step 4 and ends with the same numbers."""
    training.forget_after(ended, "german/step-00000010")
    damage(ended, "german/step-00000008", kind)
    outcome = train(config)

    assert outcome.status == 0, outcome.output
    if kind != "missing manifest":  # which is what a save leaves that was cut short: no checkpoint ever
        assert "skipping damaged checkpoint: " in outcome.output
        assert "german/step-00000008" in outcome.output.replace("\n", "")
    assert "resumes after step 4 of 10" in outcome.output
    assert_same(ended, unbroken)


def test_with_every_checkpoint_of_a_stage_damaged_the_stage_begins_again(ended, config, unbroken):
    """From the pre-anneal checkpoint before it."""
    for folder in ("german/step-00000010", "german/step-00000008", "german/step-00000004"):
        damage(ended, folder, "flipped byte")
    outcome = train(config)

    assert outcome.status == 0, outcome.output
    assert outcome.output.count("skipping damaged checkpoint: ") == 3
    assert "stage 2/2 german begins" in outcome.output
    assert_same(ended, unbroken)


def test_a_stage_whose_folder_was_removed_is_reported_as_it_is_trained_now(ended, raw, unbroken, tmp_path):
    """German is trained again with half of its LR, killed at its fifth step: four steps, none of the old losses.

    At its end the summary and the TensorBoard curves are those of a run that trained it so in the first place.
    """
    german = raw["stages"][1] | {"lr": raw["stages"][1]["lr"] | {"max": 1e-3}}
    again = training.changed(raw, stages=[raw["stages"][0], german], metrics={"enable_tensorboard": True})
    config = training.write_config(again, tmp_path / "again.toml")
    shutil.rmtree(ended / "german")
    killed = train(config, fault=Fault("titan_cpt.train:Trainer.train_step", 5, ended / "german" / "step-00000004"))
    stage = summarize(ended)["stages"][1]
    outcome = train(config)
    first = training.changed(again, job={"name": "first"})
    train(training.write_config(first, tmp_path / "first.toml"))
    now, whole = (summarize(tmp_path / name)["stages"] for name in ("run", "first"))

    assert (killed.status, outcome.status) == (-signal.SIGKILL, 0), outcome.output
    assert (stage["steps_done"], stage["measured_at"], stage["is_done"]) == (4, 0, False)
    assert set(training.checkpoints_of(ended)) == set(training.checkpoints_of(unbroken))
    measured = ("before", "after", "forgetting", "left_at", "adaptation", "steps_done", "timed_steps", "is_done")
    assert [{key: one[key] for key in measured} for one in now] == [
        {key: one[key] for key in measured} for one in whole
    ]
    assert json.loads((ended / "summary.json").read_text())["stages"][1]["after"] == whole[1]["after"]
    assert whole[1]["after"] != summarize(unbroken)["stages"][1]["after"]
    assert points_of(ended, "train/lr") == [
        (step, lr) for step, lr in points_of(tmp_path / "first", "train/lr") if step > 12
    ]
    assert f"newest checkpoint: {ended / 'german' / 'step-00000010'}" in outcome.output
    assert f"  checkpoint: {ended / 'german' / 'step-00000008'}" in outcome.output


def test_copies_of_checkpoints_are_neither_removed_nor_resumed_from(ended, config, unbroken):
    """Three copies that a user made, one as a stage of the run; pruning left none of them before. Eval skips them."""
    training.forget_after(ended, "german/step-00000010")
    copies = [ended / "german" / "step-00000008-best", ended / "german_old", ended / "english" / "step-00000011"]
    for copy, source in zip(copies, ["german/step-00000008", "german", "english/step-00000012"], strict=True):
        shutil.copytree(ended / source, copy)
    before = [training.files_of(copy) for copy in copies]
    outcome = train(config, "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "1")

    assert outcome.status == 0, outcome.output
    note = " ".join(outcome.output.split())  # without line breaks
    assert f"{copies[0]}, {copies[1] / 'step-00000004'}, " in note
    assert "was copied, renamed or moved here, so training neither uses nor removes it" in note
    assert [training.files_of(copy) for copy in copies] == before
    found = [weights.folder for weights in stage_ends(ended)]
    assert found == [ended / "english" / "step-00000012", ended / "german" / "step-00000010"]
    assert_same(ended, unbroken)


def test_a_stage_whose_folder_was_renamed_is_trained_again(ended, config, unbroken):
    """Renaming is the careful way of removing: the renamed folder is not taken for the stage's, and stays."""
    (ended / "german").rename(ended / "german_old")
    outcome = train(config)

    assert outcome.status == 0, outcome.output
    assert "stage 2/2 german begins" in outcome.output
    assert (ended / "german_old" / "step-00000010" / "manifest.json").exists()
    assert_same(ended, unbroken)


def test_with_every_checkpoint_damaged_nothing_is_trained_over_them(ended, config):
    """A failing disk must not make the run start again and overwrite its results: status 2, and what to do."""
    record = (ended / "metrics.jsonl").read_bytes()
    for folder in training.checkpoints_of(ended):
        damage(ended, folder, "flipped byte")
    outcome = train(config)

    assert outcome.status == 2
    assert "all of its checkpoints are damaged" in " ".join(outcome.output.split())
    assert "Traceback" not in outcome.output
    assert (ended / "metrics.jsonl").read_bytes() == record


def test_a_damaged_pre_anneal_checkpoint_is_an_error_and_not_another_beginning(ended, config):
    """The next stage cannot begin as planned, and does not begin from another checkpoint instead."""
    shutil.rmtree(ended / "german")
    damage(ended, "english/step-00000009", "flipped byte")
    outcome = train(config)

    assert outcome.status == 2
    assert "english/step-00000009" in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_a_full_disk_ends_the_run_with_2_and_the_last_good_checkpoint_is_whole(ended, config, unbroken, mode):
    """No file may exceed 0.5 MB: the save of German's step 8 fails; with room again the run resumes from step 4."""
    training.forget_after(ended, "german/step-00000010", "german/step-00000008")
    outcome = train(config, "--checkpoint.async_mode", mode, largest_file_bytes=500_000)
    whole = manifest.verify(ended / "german" / "step-00000004")
    left = training.checkpoints_of(ended)
    last = train(config)

    assert outcome.status == 2
    assert "german/step-00000008: cannot be written: " in outcome.output
    assert f"{ended / 'german' / 'step-00000004'} is the newest complete checkpoint" in outcome.output
    assert "Traceback" not in outcome.output
    assert whole["steps_done"] == 4
    assert "german/step-00000008" not in left
    assert last.status == 0, last.output
    assert_same(ended, unbroken)


def test_an_output_folder_that_cannot_be_written_ends_with_2(raw, config, tmp_path):
    """output_dir is below a regular file, which not even root can write into."""
    (tmp_path / "file").write_text("")
    outcome = train(config, "--job.output_dir", str(tmp_path / "file" / "outputs"))

    assert outcome.status == 2
    assert "cannot be written" in outcome.output
    assert "Traceback" not in outcome.output


def test_a_record_that_cannot_grow_waits_in_memory_and_no_checkpoint_is_made_without_it(config, tmp_path):
    """metrics.jsonl fills the disk: the run warns; the pre-anneal checkpoint cannot be saved, which ends the run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"kind": "event", "name": "earlier"}\n' * 1000)
    outcome = train(config, "--checkpoint.interval", "1000", largest_file_bytes=38_000)

    assert outcome.status == 2, outcome.output
    assert "metrics.jsonl cannot be written: File too large; " in outcome.output
    assert "english/step-00000009: cannot be written: " in outcome.output
    assert "Traceback" not in outcome.output
    assert training.checkpoints_of(run) == []
    assert Path(run / "metrics.jsonl").stat().st_size <= 38_000


def test_a_record_that_had_to_wait_is_whole_once_there_is_room(tmp_path, monkeypatch):
    """Ten lines, the disk full in the middle of one: a warning; later the file has each line once and in order."""
    log = MetricsLog(tmp_path, writing=True, tensorboard=None, peak_flops=1.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
    try:
        for number in range(10):
            log.event(f"e{number}")
        trouble = log.trouble
        with pytest.raises(OSError, match="File too large"):
            log.fsync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.event("last")
    log.close()

    assert "metrics.jsonl cannot be written: File too large" in trouble
    assert log.trouble == ""
    assert [e["name"] for e in training.events_of(tmp_path)] == [*(f"e{number}" for number in range(10)), "last"]
