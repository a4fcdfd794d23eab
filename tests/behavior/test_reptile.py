"""Runs whose second stage pulls its weights every third step: by hand, across kills, with bad steps, between ranks."""

import shutil
import signal

import faulty
import numpy as np
import pytest
import torch
import training
from faulty import BadNumbers
from training import Fault

from titan_cpt.data.inventory import take_inventory
from titan_cpt.planning.planner import make_plan
from titan_cpt.training.forgetting import validate
from titan_cpt.training.stage_start import begin_stage

pytestmark = training.THEIR_WARNINGS_IGNORED
EVERY, STEP = 3, 0.3


@pytest.fixture
def raw(data, tmp_path):
    """Three steps of English; ten of German with pulls after 3, 6 and 9, saved after 4, 8 and 10."""
    raw = training.two_stages(data, tmp_path)
    raw["stages"][0] |= {"steps": 3, "lr": {"schedule": "constant", "max": 2e-3}}
    raw["stages"][1]["reptile"] = {"every": EVERY, "step": STEP}
    raw["metrics"]["log_freq"] = 100
    raw["validation"]["interval"] = EVERY
    return raw


def run(raw, name, *faults, ranks=1, **tables):
    """Start a run, or resume it; its folder and its outcome."""
    changed = training.changed(raw, **{**tables, "job": {"name": name}})
    path = training.write_config(changed, training.Path(raw["job"]["output_dir"]) / f"{name}.toml")
    return path.parent / name, faulty.train(path, faults=faults, ranks=ranks)


def end_of(run, part="model"):
    return training.tensors_of(run / "german" / "step-00000010", part)


def losses_of(run, kind):
    """German's losses by step and dataset."""
    lines = [line for line in training.lines_of(run, kind) if line["stage"] == "german"]
    return {(line["step"], line.get("dataset")): line["loss_nats_per_token"] for line in lines}


def assert_same(run, other):
    assert training.numbers_of(run) == training.numbers_of(other)
    assert training.checkpoints_of(run) == training.checkpoints_of(other)
    for part in ("model", "optimizer", "reptile"):
        assert training.same_bits(end_of(run, part), end_of(other, part))


def by_hand(raw, english):
    """German as a plain loop without Reptile, and numpy after steps 3, 6 and 9: losses and final weights by name."""
    plain = training.changed(raw, job={"name": "by-hand"})
    del plain["stages"][1]["reptile"]
    shutil.copytree(english, training.Path(raw["job"]["output_dir"]) / "by-hand" / "english")
    losses = []
    with training.built_trainer(training.config_of(plain)) as trainer:
        stage = trainer.plan.stages[1]
        begin_stage(trainer, stage)
        loader = training.loader_of(trainer, stage)
        old = [weight.detach().numpy().copy() for weight in trainer.model.parameters()]
        for step in range(stage.steps):
            losses.append(trainer.train_step(loader, stage, step).loss.item())
            if (step + 1) % EVERY == 0:
                new = [weight.detach().numpy() for weight in trainer.model.parameters()]
                old = [before + np.float32(STEP) * (after - before) for before, after in zip(old, new, strict=True)]
                with torch.no_grad():
                    for weight, pulled in zip(trainer.model.parameters(), old, strict=True):
                        weight.copy_(torch.from_numpy(pulled))
                validate(trainer, stage, step + 1)
        return losses, {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def test_the_weights_are_those_of_a_loop_by_hand_also_across_kills_at_before_and_after_a_pull(raw):
    """Killed between two pulls, at the start of a pull, right after a pull, and stopped at the step of a pull."""
    whole, outcome = run(raw, "whole")
    losses, weights = by_hand(raw, whole / "english")
    saved = whole.with_name("broken") / "german" / "step-00000004"
    pull = "titan_cpt.training.weights.reptile:OldWeights.pull"
    step = "titan_cpt.train:Trainer.train_step"
    faults = [
        Fault(step, 3 + 6, saved),  # after steps 1 to 5, of which 4 are saved
        Fault(pull, 1),  # of step 6, the first pull of this session
        Fault(step, 3),  # the step after that pull
    ]
    killed = [run(raw, "broken", fault)[1].status for fault in faults]
    folder, last = run(raw, "broken")

    assert outcome.status == 0, outcome.output
    assert (killed, last.status) == ([-signal.SIGKILL] * 3, 0), last.output
    assert_same(folder, whole)
    assert training.same_bits(end_of(whole), weights)
    found = [line["loss_nats_per_token"] for line in training.lines_of(whole, "train") if line["stage"] == "german"]
    assert found == [pytest.approx(loss, rel=1e-6) for loss in losses]
    validations = [losses_of(folder, "validation") for folder in (whole, whole.with_name("by-hand"))]
    assert {key: validations[0][key] for key in validations[1]} == validations[1]
    assert sorted({step for step, _ in validations[1]}) == [3, 6, 9]
    # Saved after step 4: the weights that step 3 left behind. After steps without a pull the old ones are missing.
    assert training.tensors_of(whole / "german" / "step-00000008", "reptile")
    assert not training.tensors_of(whole / "english" / "step-00000003", "reptile")


def test_step_1_trains_like_no_reptile(raw):
    """The same plan, and the same bits; a note says so."""
    raw["stages"][1]["reptile"]["step"] = 1.0
    pulled, outcome = run(raw, "pulled")
    del raw["stages"][1]["reptile"]
    plain, _ = run(raw, "plain")

    assert "with step = 1 no weight is pulled" in " ".join(outcome.output.split())
    assert_same(pulled, plain)


def test_a_bad_step_is_found_before_the_pull_that_follows_it(raw):
    """Step 5, the second before the pull after step 6, with metrics read only when something needs them: the same bits
    as with metrics of every step. A rollback to step 4 brings back the old weights that were saved there."""
    bad = BadNumbers("german", (4,))
    raw["validation"]["interval"] = 1000  # it would read the metrics too
    rarely, outcome = run(raw, "rarely", bad, training={"on_nonfinite": "skip"})
    often, _ = run(raw, "often", bad, training={"on_nonfinite": "skip"}, metrics={"log_freq": 1})
    rolling, last = run(raw, "rolling", bad, training={"on_nonfinite": "rollback"})

    assert (outcome.status, last.status) == (0, 0), outcome.output + last.output
    assert [event["step"] for event in training.events_of(rolling, "resume")] == [4]
    for other in (often, rolling):
        assert training.numbers_of(rarely) == training.numbers_of(other)
        assert training.same_bits(end_of(rarely), end_of(other))


def test_two_ranks_pull_bfloat16_weights_as_one_rank_resumes_them(raw):
    """FSDP2 up to a signal after the first pull, then one process with a compute copy: losses as of one process."""
    raw["training"]["mixed_precision_param"] = "bfloat16"
    one, _ = run(raw, "one")
    fault = Fault("titan_cpt.train:Trainer.train_step", 3 + 7, one.with_name("two") / "german" / "step-00000004")
    _, killed = run(raw, "two", fault, ranks=2)
    two, outcome = run(raw, "two")
    losses = [
        [value[0] for key, value in sorted(training.numbers_of(folder).items(), key=str) if key[0] == "train"]
        for folder in (one, two)
    ]

    assert (killed.status, outcome.status) == (-signal.SIGKILL, 0), outcome.output
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)


def test_step_1_has_the_plan_of_no_reptile(raw):
    """One fingerprint; another step has another."""
    prints = {}
    for step in (None, 1.0, 0.5):
        table = {} if step is None else {"reptile": {"every": 3, "step": step}}
        stages = [
            raw["stages"][0],
            {key: raw["stages"][1][key] for key in raw["stages"][1] if key != "reptile"} | table,
        ]
        config = training.config_of(training.changed(raw, stages=stages))
        prints[step] = make_plan(config, take_inventory(config)).fingerprint

    assert prints[1.0] == prints[None] != prints[0.5]
