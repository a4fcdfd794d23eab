"""A config or data that changed under a run: a refusal that names the difference, or training continues with it."""

import json
import shutil
import signal

import pytest
import training
from training import Fault, train

from titan_cpt.checkpoint.manager import CheckpointManager
from titan_cpt.common.console import RunConsole
from titan_cpt.config.load import dump_config
from titan_cpt.data.inventory import take_inventory
from titan_cpt.errors import CheckpointError
from titan_cpt.planning.planner import make_plan
from titan_cpt.training.resume import find_checkpoint

pytestmark = training.THEIR_WARNINGS_IGNORED

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
    training.forget_after(ended, "german/step-00000010")
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
    training.forget_after(ended, "german/step-00000010")
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
    training.forget_after(ended, "german/step-00000010")
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


def test_the_error_offers_later_stages_for_change_only_where_there_are_some(ended, config, raw):
    """No stage follows German, so the error offers none; it offers the third stage where there is one."""
    first = train(config, "--stages.english.lr.max", "4e-3")
    with_third = training.write_config({**raw, "stages": [*raw["stages"], training.third_stage()]}, config)
    second = train(with_third, "--stages.english.lr.max", "4e-3")

    assert (first.status, second.status) == (2, 2)
    assert "begin a new run under another name (--job.name NAME)" in first.output
    assert "may be changed freely" not in first.output
    assert "Stages after 'german' may be changed freely" in second.output
