"""Stages of different sequence lengths, batches and a ramp: the losses of a loop written by hand, kills, records."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training

from titan_cpt.api import Trainer
from titan_cpt.cli import main
from titan_cpt.models.gpt_neox.model import GPTNeoX

pytestmark = training.THEIR_WARNINGS_IGNORED

# Stage, length and batch of every step: the ramp begins its second size with the first step at or after 64 tokens.
STEPS = [*[("english", 8, 2)] * 4, *[("english", 8, 4)] * 3, *[("german", 16, 2)] * 4]
TOKENS = [16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 288]


def lengths(data, out):
    """English in sequences of 8 tokens with a ramp, then German in sequences of 16; constant LRs."""
    raw = training.two_stages(data, out)
    raw["training"] |= {"seq_len": 8, "global_batch_size": 4, "local_batch_size": 2, "max_norm": 0.5}
    raw["validation"] |= {"interval": 3, "sequences": 6}
    raw["checkpoint"] = {"interval": 2, "keep_latest_k": 20}
    english, german = raw["stages"]
    english |= {"steps": 7, "global_batch_size": {"0": 2, "64": 4}, "local_batch_size": 1}
    german |= {"steps": 4, "seq_len": 16, "global_batch_size": 2}
    del german["replay"]
    for stage, peak in ((english, 2e-3), (german, 1e-3)):
        stage["lr"] = {"schedule": "constant", "max": peak, "warmup_until": 0}
    return raw


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The config."""
    folder = tmp_path_factory.mktemp("lengths")
    return lengths(training.write_languages(folder), folder)


@pytest.fixture(scope="module")
def unbroken(raw, tmp_path_factory):
    """The run."""
    folder = tmp_path_factory.mktemp("unbroken")
    raw = training.changed(raw, job={"output_dir": str(folder)})
    outcome = training.train(training.write_config(raw, folder / "c.toml"))

    assert outcome.status == 0, outcome.output
    return folder / "run"


def trains(run):
    """The lines of training steps."""
    return training.lines_of(run, "train")


def test_losses_and_norms_are_those_of_a_loop_written_by_hand(raw, unbroken):
    """A plain model, AdamW and clipping; every step is one batch of whole sequences, without micro-batches.

    Window k of n is tokens [k L, (k + 1) L]: the loop reads the windows that the loader reports, from the raw files.
    """
    with training.built_trainer(training.config_of(training.changed(raw, job={"name": "by-hand"}))) as trainer:
        plan, seed = trainer.plan, trainer.plan.seed
        windows = {
            (stage.name, step): [
                (draw.source, int(window))
                for draws in [plan.batch(stage, step)]
                for draw, window in zip(draws, trainer.readers[stage.name].windows(draws), strict=True)
            ]
            for stage in plan.stages
            for step in range(stage.steps)
        }
        files = {name: trainer.readers[stage].sources[name] for stage, name in (("english", "en"), ("german", "de"))}
        tokens = {name: source.read(0, source.tokens) for name, source in files.items()}
        model = GPTNeoX(plan.spec)
    model.init_weights(seed)
    found, done = [], {"english": 0, "german": 0}
    optimizer = None
    for stage, length, size in STEPS:
        if done[stage] == 0 and (stage == "english" or raw["stages"][1]["optimizer_state"] == "reset"):
            matrices = [p for p in model.parameters() if p.dim() == 2]
            others = [p for p in model.parameters() if p.dim() != 2]
            groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
        drawn = windows[stage, done[stage]]
        rows = np.stack([tokens[name][number * length : (number + 1) * length + 1] for name, number in drawn])
        batch = torch.from_numpy(rows.astype(np.int64))

        assert batch.shape == (size, length + 1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 if stage == "english" else 1e-3
        optimizer.step()
        found += [loss.item(), norm.item()]
        done[stage] += 1
    ours = [line[key] for line in trains(unbroken) for key in ("loss_nats_per_token", "grad_norm")]

    assert ours == pytest.approx(found, rel=2e-5)


def test_metrics_count_the_tokens_of_each_step(unbroken):
    """The plan counts the same, and the summary their sum."""
    plan = json.loads((unbroken / "plan.json").read_text())
    summary = json.loads((unbroken / "summary.json").read_text())

    assert [line["tokens"] for line in trains(unbroken)] == TOKENS
    assert [stage["tokens"] for stage in plan["stages"]] == [160, 128]
    assert [stage["trained_tokens"] for stage in summary["stages"]] == [160, 128]


def test_the_library_counts_the_same_tokens(raw, tmp_path):
    """Step by step."""
    config = training.config_of(training.changed(raw, job={"output_dir": str(tmp_path)}))
    with Trainer(config, quiet=True) as trainer:
        tokens = [step.tokens for step in trainer.steps()]

    assert tokens == TOKENS


def test_reports_lists_and_exports_count_the_same_tokens(unbroken, tmp_path, capsys):
    """The commands end well; the model card names each stage's tokens and batches."""
    for words in (
        ("report", unbroken, "--html", tmp_path / "html"),
        ("runs", unbroken.parent),
        ("plan", "--config", unbroken / "config.toml"),
        ("export", unbroken / "german" / "step-00000004", tmp_path / "exported"),
    ):
        with pytest.raises(SystemExit) as left:
            main([*map(str, words)])
        assert left.value.code == 0, capsys.readouterr()
    card = (tmp_path / "exported" / "README.md").read_text()

    assert "| english | en 100 % | 7 | 160 |" in card
    assert "| german | de 100 % | 4 | 128 |" in card
    assert "Batches of 2 to 4 sequences x 8 tokens (english), 2 sequences x 16 tokens (german), gradients" in card
    assert "en@16" in (tmp_path / "html" / "index.html").read_text()


def test_each_stage_validates_at_the_runs_length_and_at_its_own(unbroken):
    """The second one under labels of its own; forgetting needs a baseline on the same windows."""
    lines = training.lines_of(unbroken, "validation")
    found = {(line["stage"], line["step"], line["dataset"]): line for line in lines}
    english = {dataset for stage, _, dataset in found if stage == "english"}
    german = {dataset for stage, _, dataset in found if stage == "german"}
    forgetting = found["german", 4, "en"]["forgetting_nats_per_token"]

    assert english == {"en", "de"}
    assert german == {"en", "de", "en@16", "de@16"}
    assert found["german", 0, "en"]["loss_nats_per_token"] == found["english", 7, "en"]["loss_nats_per_token"]
    assert (
        forgetting == found["german", 4, "en"]["loss_nats_per_token"] - found["german", 0, "en"]["loss_nats_per_token"]
    )
    assert found["german", 4, "en@16"]["forgetting_nats_per_token"] == (
        found["german", 4, "en@16"]["loss_nats_per_token"] - found["german", 0, "en@16"]["loss_nats_per_token"]
    )
    assert {found["german", 4, name]["forgetting_nats_per_token"] for name in ("de", "de@16")} == {None}


def test_a_third_stage_forgets_only_against_windows_that_its_baseline_measured(raw, tmp_path):
    """English again after German, at 16 tokens: German was left at its end, and English at the start of German."""
    third = {"name": "again", "dataset": "en", "steps": 2, "seq_len": 16, "lr": {"schedule": "constant", "max": 1e-3}}
    fourth = third | {"name": "last", "dataset": "de", "seq_len": 32}
    stages = [*raw["stages"], third | {"global_batch_size": 2}, fourth | {"global_batch_size": 2}]
    config = training.changed(raw, job={"output_dir": str(tmp_path)}, stages=stages)
    outcome = training.train(training.write_config(config, tmp_path / "c.toml"))
    lines = training.lines_of(tmp_path / "run", "validation")
    forgotten = {
        (line["stage"], line["dataset"]): line["forgetting_nats_per_token"] is not None
        for line in lines
        if line["stage"] in ("again", "last")
    }

    assert outcome.status == 0, outcome.output
    assert forgotten == {
        **{("again", "en"): False, ("again", "de"): True, ("again", "en@16"): False, ("again", "de@16"): True},
        **{("last", "en"): True, ("last", "de"): False, ("last", "en@32"): True, ("last", "de@32"): False},
    }


KILLS = {
    "in the first size of the ramp": training.Fault("titan_cpt.train:Trainer.train_step", 4),
    "at the first step of the next size": training.Fault("titan_cpt.train:Trainer.train_step", 5),
    "in the second size of the ramp": training.Fault("titan_cpt.train:Trainer.train_step", 7),
    "at the border of the lengths": training.Fault("titan_cpt.train:begin_stage", 2),
    "at the first step of the other length": training.Fault("titan_cpt.train:Trainer.train_step", 8),
    "in the other length": training.Fault("titan_cpt.train:Trainer.train_step", 11),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_and_a_resume_change_nothing(raw, unbroken, tmp_path, moment):
    """Every number of every step and measurement, weights and moments, to the last bit."""
    config = training.write_config(training.changed(raw, job={"output_dir": str(tmp_path)}), tmp_path / "c.toml")
    killed = training.train(config, fault=KILLS[moment])
    resumed = training.train(config)

    assert (killed.status, resumed.status) == (-9, 0), resumed.output
    assert training.numbers_of(tmp_path / "run") == training.numbers_of(unbroken)
    for name in ("english/step-00000007", "german/step-00000004"):
        for part in ("model", "optimizer"):
            ours, theirs = (training.tensors_of(run / name, part) for run in (tmp_path / "run", unbroken))
            assert training.same_bits(ours, theirs)
