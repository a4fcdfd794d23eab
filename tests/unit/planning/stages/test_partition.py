"""`trainable` and `lr_scale` in the plan."""

import dataclasses
import math

import pytest
import training

from titan_cpt.data.inventory import DataInventory
from titan_cpt.errors import PlanError
from titan_cpt.planning.plan_json import plan_as_json
from titan_cpt.planning.planner import make_plan
from titan_cpt.planning.stages.partition import weight_sizes

pytestmark = training.THEIR_WARNINGS_IGNORED


def plan_of(tmp_path, *stages, base_vocab_size=None, **tables):
    """The plan of the two stages of the tests, with further keys."""
    raw = training.changed(training.two_stages(tmp_path, tmp_path), **tables)
    for stage, keys in zip(raw["stages"], stages, strict=False):
        stage |= keys
    raw["datasets"] = {name: {"train": str(tmp_path / name)} for name in ("en", "de")}
    inventory = DataInventory({"en": 100_000, "de": 100_000}, 257)
    if base_vocab_size is not None:
        inventory = dataclasses.replace(inventory, base_vocab_size=base_vocab_size)
    return make_plan(training.config_of(raw), inventory)


def test_the_plan_says_what_each_stage_trains(tmp_path):
    plan = plan_of(tmp_path, {"trainable": ["embedding", "head"]}, {"lr_scale": {"blocks.0": 0.5}})
    first, second = plan.stages
    rows, width = plan.spec.vocab_size, plan.spec.width

    assert first.partition.parameters == 2 * rows * width
    assert [name for name, parts in first.partition.parts.items() if parts] == ["embedding.weight", "head.weight"]
    assert second.partition.parameters == plan.spec.parameters
    json = plan_as_json(plan)["stages"]
    assert (json[0]["partition"]["weights"], json[0]["partition"]["parameters"]) == (2, 2 * rows * width)
    assert json[1]["partition"]["parts"]["blocks.0.mlp.down.bias"] == [{"rows": [0, width], "lr_scale": 0.5}]


def test_sizes_are_those_of_the_model():
    from titan_cpt.checkpoint.hf_release import weight_shapes
    from titan_cpt.models.gpt_neox.spec import GPTNeoXSpec

    spec = GPTNeoXSpec(family="gpt_neox", layers=2, width=16, heads=2, mlp_width=32, vocab_size=24, rotary_fraction=0.5)
    assert weight_sizes(spec) == weight_shapes(spec)


def test_both_keys_are_in_the_recipe_only_where_they_have_an_effect(tmp_path):
    plain = plan_of(tmp_path)
    trivial = plan_of(tmp_path, {"trainable": ["*"]}, {"lr_scale": {"head": 1.0}})
    given = plan_of(tmp_path, {"trainable": ["head", "blocks"]}, {"lr_scale": {"head": 2}})

    assert trivial.fingerprint == plain.fingerprint
    assert [stage.partition for stage in trivial.stages] == [None, None]
    assert {*given.stages[0].recipe} - {*plain.stages[0].recipe} == {"trainable"}
    assert given.stages[0].recipe["trainable"] == ["blocks", "head"]
    assert given.stages[1].recipe["lr_scale"] == {"head": 2.0}


def test_frozen_weights_take_no_disk_space_for_moments(tmp_path):
    """3 checkpoints of either stage and the two ends, of which the first stage's lack the blocks' moments."""
    plain = plan_of(tmp_path)
    plan = plan_of(tmp_path, {"trainable": ["embedding", "head"]}, {"trainable": ["embedding", "head"]})
    every = 4 * plan.spec.parameters + 8 * 2 * plan.spec.embedding_parameters

    assert plan.disk_bytes(2) == 6 * every
    assert plain.disk_bytes(2) == 6 * 12 * plan.spec.parameters
    muon = plan_of(tmp_path, {"trainable": ["blocks"]}, {"trainable": ["blocks"]}, optimizer={"name": "Muon"})
    blocks = muon.spec.layers * sum(
        (4 if len(size) == 2 else 8) * math.prod(size) for _, size, _ in muon.spec.block_parameters()
    )
    assert muon.disk_bytes(2) == 6 * (4 * plan.spec.parameters + blocks)


def test_a_state_that_an_earlier_stage_did_not_make_begins_anew_with_a_note(tmp_path):
    """The second stage keeps the state of the first, which trained the head only."""
    plan = plan_of(tmp_path, {"trainable": ["head"]}, {"trainable": ["head", "final_norm"]})

    assert (
        "stages.german.optimizer_state: the state of final_norm.weight, final_norm.bias begins anew, as stage "
        "'english' did not train these in the same rows"
    ) in plan.notes
    assert not any("begins anew" in note for note in plan_of(tmp_path, {"trainable": ["*"]}).notes)


@pytest.mark.parametrize(
    ("keys", "tables", "message"),
    [
        (
            {"trainable": ["heads"]},
            {},
            "stages.english.trainable: 'heads' matches no weight; there are embedding.weight",
        ),
        ({"trainable": ["embedding.new"]}, {}, "without [tokenizer] extend there are none"),
        (
            {"lr_scale": {"head": 2}},
            {"optimizer": {"implementation": "triton"}},
            'stages.english.lr_scale: is not supported together with optimizer.implementation = "triton"',
        ),
    ],
)
def test_what_cannot_be_trained_is_a_problem_of_the_plan(tmp_path, keys, tables, message):
    with pytest.raises(PlanError) as error:
        plan_of(tmp_path, keys, **tables)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("trainable", "noted"), [(["embedding.new", "head.new"], False), (["embedding", "head.new"], True)]
)
def test_replay_is_not_recommended_to_a_stage_that_trains_only_new_rows(tmp_path, trainable, noted):
    tokenizer = {"path": str(tmp_path / "new.json"), "extend": {"base": str(tmp_path / "base.json")}}
    second = {"trainable": trainable, "replay": {"fraction": 0.0}}
    plan = plan_of(tmp_path, {}, second, base_vocab_size=250, tokenizer=tokenizer)
    assert any("there is no replay" in note for note in plan.notes) is noted
