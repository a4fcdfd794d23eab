"""The RoPE of each stage: its lineage, the keys that change it, its recipe, and values that cannot work."""

import pytest
from plans import COSINE, stage

from titan_cpt.errors import PlanError
from titan_cpt.models.spec import Rope, RopeScaling

YARN = '{ kind = "yarn", factor = 4.0, original_seq_len = 2048 }'


def ropes(plan):
    return [each.spec.rope for each in plan.stages]


def test_a_stage_keeps_the_rope_of_its_initial_weights(head, make):
    """From the stage before, from a named stage, and from [model] where the weights are new."""
    plan = make(
        head
        + stage("a", "pile", 10)
        + stage("b", "pile", 10, rope="{ base = 5e5 }")
        + stage("c", "pile", 10)
        + stage("d", "pile", 10, init='"stage:a"')
        + stage("e", "pile", 10, init='"stage:b"', rope=YARN)
        + stage("f", "pile", 10, init='"random"')
    )
    plain, base = Rope(10_000.0), Rope(500_000.0)
    yarn = Rope(500_000.0, RopeScaling(kind="yarn", factor=4.0, original_seq_len=2048))

    assert ropes(plan) == [plain, base, base, plain, yarn, plain]
    assert plan.spec.rope == plain
    assert {stage.spec.parameters for stage in plan.stages} == {plan.spec.parameters}


def test_each_key_of_a_rope_changes_only_what_it_names(head, make):
    """A base keeps the scaling, a kind keeps the base and replaces the whole scaling, "none" removes it."""
    plan = make(
        head
        + stage("a", "pile", 10, rope='{ kind = "llama3", factor = 8.0, original_seq_len = 64, low_freq_factor = 2.0 }')
        + stage("b", "pile", 10, rope="{ base = 300.0 }")
        + stage("c", "pile", 10, rope='{ kind = "llama3", factor = 16.0, original_seq_len = 64 }')
        + stage("d", "pile", 10, rope='{ kind = "none" }')
    )
    first = RopeScaling(kind="llama3", factor=8.0, original_seq_len=64, low_freq_factor=2.0)
    third = RopeScaling(kind="llama3", factor=16.0, original_seq_len=64)

    assert ropes(plan) == [Rope(10_000.0, first), Rope(300.0, first), Rope(300.0, third), Rope(300.0)]


def test_the_recipe_has_the_keys_that_a_stage_sets(head, make):
    """With the defaults of a scaling; a stage without `rope` has none, so that its fingerprint stays what it was."""
    plan = make(
        head
        + stage("a", "pile", 10)
        + stage("b", "pile", 10, rope=YARN.replace("kind", "base = 5e5, kind"))
        + stage("c", "pile", 10, rope='{ kind = "none" }')
        + stage("d", "pile", 10, rope='{ kind = "linear", factor = 8.0 }')
    )
    recipes = [{key: value for key, value in each.recipe.items() if key.startswith("rope")} for each in plan.stages]

    assert recipes[0] == {}
    assert recipes[1] == {
        "rope.base": 500_000.0,
        "rope.kind": "yarn",
        "rope.factor": 4.0,
        "rope.original_seq_len": 2048,
        "rope.beta_fast": 32.0,
        "rope.beta_slow": 1.0,
        "rope.attention_factor": pytest.approx(1.1386294361),  # 0.1 ln(4) + 1
    }
    assert recipes[2] == {"rope.kind": "none"}
    assert recipes[3] == {"rope.kind": "linear", "rope.factor": 8.0}
    assert plan.stages[3].spec.rope == Rope(500_000.0, RopeScaling(kind="linear", factor=8.0))
    assert make(head + stage("a", "pile", 10)).fingerprint == make(head + stage("a", "pile", 10, COSINE)).fingerprint


def test_a_scaling_that_cannot_work_is_refused_under_the_stages_key(head, make):
    """All stages are checked before the message."""
    bad = '{ kind = "yarn", factor = 4.0, original_seq_len = 64, beta_slow = 40.0 }'
    worse = '{ kind = "llama3", factor = 4.0, original_seq_len = 64, low_freq_factor = 4.0 }'
    with pytest.raises(PlanError) as refusal:
        make(head + stage("a", "pile", 10, rope=bad) + stage("b", "pile", 10, rope=worse))

    assert "stages.a.rope.beta_slow: must be above 0 and below beta_fast, got 40" in str(refusal.value)
    assert "stages.b.rope.low_freq_factor: must be above 0 and below high_freq_factor, got 4" in str(refusal.value)
