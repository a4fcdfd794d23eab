"""The promise: the same bytes, or a refusal that names the difference. Runs are killed, damaged, edited and compared.

All in fp32 with one process and one thread, where equal means equal to the last bit.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import Fault, Process, train

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.manager import CheckpointManager
from titan_cpt.common.console import RunConsole
from titan_cpt.config.load import dump_config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import CheckpointError
from titan_cpt.evaluation.checkpoint_paths import stage_ends
from titan_cpt.planning.planner import make_plan
from titan_cpt.reporting.summary import summarize
from titan_cpt.training.metrics import MetricsLog
from titan_cpt.training.resume import find_checkpoint

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two languages."""
    return training.write_languages(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """An undisturbed run of the real command, in its own interpreter."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = training.write_config(training.two_stages(data, folder), folder / "c.toml")
    command = [sys.executable, "-m", "titan_cpt", "train", "--config", str(config)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder / "run"


@pytest.fixture
def raw(data, tmp_path):
    """The same run, to be disturbed."""
    return training.two_stages(data, tmp_path)


@pytest.fixture
def config(raw, tmp_path):
    """Its file."""
    return training.write_config(raw, tmp_path / "c.toml")


@pytest.fixture
def ended(unbroken, config, tmp_path):
    """A copy of the finished run in this test's own folder."""
    shutil.copytree(unbroken, tmp_path / "run")
    return tmp_path / "run"


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


def forget_after(run, *folders):
    """Remove checkpoints, as if the run had not reached them yet."""
    for folder in folders:
        shutil.rmtree(run / folder)


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
    forget_after(ended, "german/step-00000010")
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
    forget_after(ended, "german/step-00000010")
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


PAST_EDITS = {
    "training.seq_len": ("8", "training.seq_len: 16 -> 8"),
    "training.global_batch_size": ("2", "training.global_batch_size: 4 -> 2"),
    "job.seed": ("1", "job.seed: 0 -> 1"),
    "stages.english.lr.max": ("4e-3", "stages.english.lr.max: 0.003 -> 0.004"),
    "stages.english.steps": ("13", "stages.english.steps: 12 -> 13"),
    "stages.german.replay.fraction": ("0.5", "stages.german.replay.fraction: 0.25 -> 0.5"),
    "optimizer.beta2": ("0.99", "stages.english.optimizer.beta2: 0.95 -> 0.99"),
    "model.width": ("32", "model.width: 64 -> 32"),
    "model.vocab_size": ("512", "model.vocab_size: 384 -> 512"),
}


def test_an_edited_past_is_refused_with_the_key_the_old_and_the_new_value(ended, config, unbroken):
    """German is running: status 2, one message, no traceback, and the run's folder is unchanged."""
    forget_after(ended, "german/step-00000010")
    for key, (value, difference) in PAST_EDITS.items():
        outcome = train(config, f"--{key}", value)

        assert outcome.status == 2, key
        assert difference in outcome.output
        assert "written under plan" in outcome.output
        assert ("model.vocab_size = 384 keeps it" in outcome.output) == (key == "model.vocab_size")
        assert "Traceback" not in outcome.output
    assert training.numbers_of(ended) == training.numbers_of(unbroken)


@pytest.mark.parametrize("name", ["en", "de"])
def test_data_that_changed_under_a_run_is_refused(ended, config, data, tmp_path, name):
    """A file of the same length with other tokens, of a stage done and of the running one."""
    own = tmp_path / "own"
    shutil.copytree(data, own)
    config.write_text(config.read_text().replace(str(data), str(own)))
    forget_after(ended, "german/step-00000010")
    moved = train(
        config, fault=Fault("titan_cpt.train:Trainer.train", 1)
    )  # another path with the same content is no matter
    content = bytearray((own / f"{name}.bin").read_bytes())
    content[100] ^= 1
    (own / f"{name}.bin").write_bytes(content)
    outcome = train(config)

    assert moved.status == -signal.SIGKILL, moved.output
    assert outcome.status == 2
    assert f"datasets.{name}.train: " in outcome.output
    assert "Traceback" not in outcome.output


def test_a_later_stage_and_keys_outside_the_recipe_may_be_edited(ended, raw, config):
    """English is done, German not begun: its LR, its steps and its data's weight may change; so may intervals."""
    shutil.rmtree(ended / "german")
    edited = training.changed(raw, checkpoint={"interval": 3}, validation={"interval": 2}, metrics={"log_freq": 7})
    edited["stages"][1] |= {"steps": 5, "lr": {"schedule": "linear", "max": 1e-3}, "replay": {"fraction": 0.5}}
    training.write_config(edited, config)
    outcome = train(config)
    lines = training.lines_of(ended, "train")[22:]

    assert outcome.status == 0, outcome.output
    assert [(line["stage"], line["step"]) for line in lines] == [("german", step) for step in range(1, 6)]
    assert lines[-1]["lr"] == pytest.approx(1e-4, rel=1e-12)
    assert {line["replayed_tokens"] for line in lines} == {32}


def test_settings_that_changed_under_a_run_are_printed_and_recorded(ended, raw, config):
    """config.toml holds only the newest settings: the old ones are in an event; a new stage is one line."""
    forget_after(ended, "german/step-00000010")
    edited = training.changed(raw, training={"local_batch_size": 4, "on_loss_spike": "skip"})
    edited["stages"].append(training.third_stage())
    training.write_config(edited, config)
    outcome, again = train(config), train(config)
    expected = [
        'stages: ["english", "german"] -> ["english", "german", "again"]',
        "training.local_batch_size: 2 -> 4",
        "training.on_loss_spike: log -> skip",
    ]

    assert (outcome.status, again.status) == (0, 0), outcome.output
    assert "settings that have changed since the run was last started:" in outcome.output
    assert all(line in outcome.output for line in expected)
    assert "settings that have changed" not in again.output
    assert [event["settings"] for event in training.events_of(ended, "settings_changed")] == [expected]


def test_layers_excluded_from_float8_are_compared_with_an_older_versions_run_too(ended, raw, config):
    """Its checkpoints do not name them, its config.toml does: the same resumes, others are refused."""
    for path in ended.glob("*/*/manifest.json"):
        record = json.loads(path.read_text())
        record["recipe"]["float8.recipe_name"] = "rowwise"
        path.write_text(json.dumps(record))
    edited = training.changed(raw, float8={"recipe_name": "rowwise", "filter_fqns": ["mlp"]})
    settings = training.config_of(edited)
    newest = ended / "german" / "step-00000010"
    identities = json.loads((newest / "manifest.json").read_text())["data"]
    plan = make_plan(settings, take_inventory(settings))
    (ended / "config.toml").write_text(dump_config(settings))
    checkpoints = CheckpointManager(ended, keep_latest=2, async_save=False, on_saved=print, on_failed=print)
    quiet = RunConsole(shown=False)

    assert find_checkpoint(plan, checkpoints, identities, quiet).folder == newest
    other = training.config_of(training.changed(edited, float8={"filter_fqns": []}))
    with pytest.raises(CheckpointError, match=r'float8.filter_fqns: \["mlp"\] -> not set'):
        find_checkpoint(make_plan(other, take_inventory(other)), checkpoints, identities, quiet)
    (ended / "config.toml").write_text(dump_config(other))
    with pytest.raises(CheckpointError, match=r'float8.filter_fqns: not set -> \["mlp"\]'):
        find_checkpoint(plan, checkpoints, identities, quiet)


def test_data_of_a_stage_that_has_not_begun_may_be_replaced(ended, config, data, tmp_path):
    """English is done; German's tokens are prepared anew before its stage begins."""
    shutil.rmtree(ended / "german")
    own = tmp_path / "own"
    shutil.copytree(data, own)
    training.write_tokens(own / "de", language=2, tokens=4000, seed=7)
    config.write_text(config.read_text().replace(str(data), str(own)))
    outcome = train(config)

    assert outcome.status == 0, outcome.output


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_a_full_disk_ends_the_run_with_2_and_the_last_good_checkpoint_is_whole(ended, config, unbroken, mode):
    """No file may exceed 0.5 MB: the save of German's step 8 fails; with room again the run resumes from step 4."""
    forget_after(ended, "german/step-00000010", "german/step-00000008")
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


def test_the_error_offers_later_stages_for_change_only_where_there_are_some(ended, config, raw):
    """No stage follows German, so the error offers none; it offers the third stage where there is one."""
    first = train(config, "--stages.english.lr.max", "4e-3")
    with_third = training.write_config({**raw, "stages": [*raw["stages"], training.third_stage()]}, config)
    second = train(with_third, "--stages.english.lr.max", "4e-3")

    assert (first.status, second.status) == (2, 2)
    assert "begin a new run under another name (--job.name NAME)" in first.output
    assert "may be changed freely" not in first.output
    assert "Stages after 'german' may be changed freely" in second.output
