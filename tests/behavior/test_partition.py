"""Stages that train parts of the weights: what is frozen, checkpoints, resumes, and the state that is kept."""

import extended
import pytest
import torch
import training
from extended import BASE_VOCABULARY as B
from training import Fault, built_trainer, config_of, train

from titan_cpt.checkpoint.hf_export import export
from titan_cpt.common.metrics_file import read_metrics
from titan_cpt.train import run_to_end
from titan_cpt.training.stage_start import begin_stage

pytestmark = training.THEIR_WARNINGS_IGNORED
WITH_ROWS = ("embedding.weight", "head.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs are."""
    return tmp_path_factory.mktemp("extended")


@pytest.fixture(scope="module")
def raw(folder):
    """The config of four stages."""
    return extended.four_stages(folder)


@pytest.fixture(scope="module")
def unbroken(raw, folder):
    """The run of all stages in one go."""
    outcome = train(training.write_config(raw, folder / "run.toml"))

    assert outcome.status == 0, outcome.output
    return folder / "run"


def end_of(run, stage, part="model"):
    """The tensors at the end of a stage."""
    return training.tensors_of(run / stage / "step-00000004", part)


def test_frozen_weights_and_old_rows_stay_bit_equal(unbroken):
    before, after = end_of(unbroken, "english"), end_of(unbroken, "rows")

    for name in before:
        rows = slice(0, B) if name in WITH_ROWS else slice(None)
        assert torch.equal(before[name][rows], after[name][rows]), name
    for name in WITH_ROWS:
        assert not torch.equal(before[name][B:], after[name][B:])


def test_moments_are_saved_with_full_shape_for_trained_rows_and_not_for_frozen_weights(unbroken):
    weights, state = end_of(unbroken, "rows"), end_of(unbroken, "rows", "optimizer")

    assert {name.split(".", 1)[1].rpartition(".")[0] for name in state} == set(WITH_ROWS)
    for name in WITH_ROWS:
        moment = state[f"state.{name}.exp_avg"]
        assert moment.shape == weights[name].shape
        assert not moment[:B].any()
    assert state["state.head.weight.exp_avg"][B:].all()


def test_a_kept_state_continues_where_the_same_rows_were_trained_and_begins_anew_elsewhere(unbroken):
    """Step counts: rows 4 + 4, the norm 4, then everything: the norm 4 + 4, all others 4."""

    def counts(stage):
        state = end_of(unbroken, stage, "optimizer")
        return {name[6:-5]: int(value) for name, value in state.items() if name.endswith(".step")}

    norm = {"final_norm.weight": 4, "final_norm.bias": 4}
    assert counts("norm") == {"embedding.weight": 8, "head.weight": 8, **norm}
    everything = counts("all")
    assert {name: everything.pop(name) for name in norm} == dict.fromkeys(norm, 8)
    assert set(everything.values()) == {4}
    event = training.events_of(unbroken, "transition")[3]
    assert event["trains"].endswith("LR x 0.1 embedding, x 0.5 blocks.0-1, x 2 head.new")
    assert "the optimizer state of embedding.weight, blocks.0" in event["weights"]


@pytest.mark.parametrize(("step", "written"), [(7, "rows/step-00000002"), (15, "all/step-00000002")])
def test_a_run_that_was_killed_equals_an_unbroken_one(raw, unbroken, folder, step, written):
    own = training.changed(raw, job={"name": f"killed-{step}"})
    path = training.write_config(own, folder / f"killed-{step}.toml")
    run = folder / f"killed-{step}"
    killed = train(path, fault=Fault("titan_cpt.train:Trainer.train_step", step + 1, run / written))
    resumed = train(path)

    assert (killed.status, resumed.status) == (-9, 0), resumed.output
    assert training.numbers_of(run) == training.numbers_of(unbroken)
    for part in ("model", "optimizer"):
        assert training.same_bits(end_of(run, "all", part), end_of(unbroken, "all", part))


def test_a_model_card_says_what_each_stage_trained(unbroken, folder):
    export(unbroken / "all" / "step-00000004", folder / "exported", dtype="float32", log=lambda line: None)
    card = (folder / "exported" / "README.md").read_text()

    assert "\n- rows trained only `embedding.new`, `head.new`\n- rows: 3 x the learning rate for `head.new`\n" in card
    assert "2 x the learning rate for `head.new`" in card
    assert "- english trained" not in card


def test_lines_have_the_learning_rate_of_every_pattern(unbroken):
    by_stage = {line["stage"]: line for line in read_metrics(unbroken).trains}

    assert "lr_by_group" not in by_stage["english"]
    assert "lr_by_group" not in by_stage["norm"]
    assert by_stage["rows"]["lr"] == 3e-3
    assert by_stage["rows"]["lr_by_group"] == {"head.new": pytest.approx(9e-3)}
    scales = {"embedding": 0.1, "head.new": 2, "blocks.0-1": 0.5}
    assert by_stage["all"]["lr_by_group"] == {name: pytest.approx(3e-3 * scale) for name, scale in scales.items()}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"trainable": ["embedding.new"]}, 'trainable: ["embedding.new", "head.new"] -> ["embedding.new"]'),
        ({"lr_scale": {"head.new": 4}}, 'lr_scale: {"head.new": 3.0} -> {"head.new": 4.0}'),
    ],
)
def test_a_resume_with_other_patterns_is_refused(raw, unbroken, folder, keys, line):
    stages = [{**stage, **(keys if stage["name"] == "rows" else {})} for stage in raw["stages"]]
    if "trainable" in keys:
        stages[1].pop("lr_scale")
    outcome = train(training.write_config(training.changed(raw, stages=stages), folder / "changed.toml"))

    assert outcome.status == 2
    assert f"stages.rows.{line}" in outcome.output


def test_the_compute_copy_follows_trained_rows_and_the_norm_is_theirs(raw, tmp_path):
    """bfloat16 in one process: after each step the copy is the rounded weights, and old rows are what they were."""
    own = training.changed(raw, job={"output_dir": str(tmp_path)}, training={"mixed_precision_param": "bfloat16"})
    own["stages"] = [{**own["stages"][1], "init": "random"}]
    with built_trainer(config_of(own)) as trainer:
        stage = trainer.plan.stages[0]
        begin_stage(trainer, stage)
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        loader = training.loader_of(trainer, stage)
        for step in range(3):
            trainer.train_step(loader, stage, step)
            trainer.runner.copy.refresh()
            copies = dict(trainer.runner.model.named_parameters())
            for name, weight in trainer.model.named_parameters():
                assert torch.equal(copies[name], weight.to(torch.bfloat16))
                rows = slice(0, B) if name in WITH_ROWS else slice(None)
                assert torch.equal(weight[rows], before[name][rows])
                assert weight.grad is None


def test_a_warm_up_and_reptile_leave_frozen_weights_bit_equal(raw, tmp_path):
    """Also where they are -0.0, and the moments are those of the passes."""
    own = training.changed(raw, job={"output_dir": str(tmp_path)})
    extra = {"init": "random", "optimizer_state": "warm:2", "reptile": {"every": 2, "step": 0.5}}
    own["stages"] = [{**own["stages"][1], **extra}]
    with built_trainer(config_of(own)) as trainer:
        stage = trainer.plan.stages[0]
        steps_done = begin_stage(trainer, stage)
        with torch.no_grad():
            trainer.model.final_norm.bias.fill_(-0.0)
            trainer.model.embedding.weight[3].fill_(-0.0)
            trainer.copies.begin(stage)
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        run_to_end(trainer.stage_steps(stage, steps_done))
        for name, weight in trainer.model.named_parameters():
            rows = slice(0, B) if name in WITH_ROWS else slice(None)
            assert torch.equal(weight[rows].view(torch.int32), before[name][rows].view(torch.int32)), name
        assert not torch.equal(trainer.model.head.weight, before["head.weight"])
