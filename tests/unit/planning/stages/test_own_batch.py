"""A stage's own sequence length, batch size or ramp, and local batch: in the plan, in the recipe, in messages."""

import pytest
from plans import datasets, drawn, stage

from titan_cpt.errors import PlanError
from titan_cpt.planning.plan_json import plan_as_json

# Stage `short` has the 20 sequences x 16 of [training]; `long` begins with 4 x 64 tokens and ends with 12 x 64.
RAMP = '{ "0" = 4, "1_000" = 12 }'
LONG = {"seq_len": 64, "global_batch_size": RAMP, "local_batch_size": 1}


def two_lengths(head, budget="6_000", **more):
    return head + stage("short", "pile", 10) + stage("long", "german", budget, **LONG, **more)


def test_a_stage_has_its_own_length_and_batches(head, make):
    """4 steps of 256 tokens are the first to reach 1,000; of the other 4,976 tokens each step takes 768: 7 steps."""
    plan = make(two_lengths(head))
    short, long = plan.stages

    assert (short.seq_len, short.tokens, short.local_batch_size) == (16, 10 * 320, 2)
    assert (long.seq_len, long.steps, long.local_batch_size) == (64, 4 + 7, 1)
    assert [long.step_tokens(step) for step in range(11)] == [256] * 4 + [768] * 7
    assert [plan.accumulation(long, step) for step in (0, 3, 4, 10)] == [4, 4, 12, 12]
    assert [len(plan.batch(long, step)) for step in (0, 3, 4, 10)] == [4, 4, 12, 12]
    assert (long.tokens, plan.tokens_before(long)) == (4 * 256 + 7 * 768, 3200)


def test_only_what_differs_from_training_is_in_the_recipe(head, make):
    """A key that repeats [training], and the local batch, change nothing; a ramp is written in tokens."""
    same = {"seq_len": 16, "global_batch_size": '{ "0" = 20 }', "local_batch_size": 5}
    plain, repeated = (make(head + stage("a", "pile", 10, **keys)) for keys in ({}, same))
    recipe = make(two_lengths(head)).recipe_until(1)

    assert repeated.fingerprint == plain.fingerprint
    assert (recipe["stages.long.seq_len"], recipe["stages.long.global_batch_size"]) == (64, {"0": 4, "1000": 12})
    assert "stages.short.seq_len" not in recipe
    assert make(head + stage("a", "pile", 10, global_batch_size=40)).recipe_until(0)["stages.a.global_batch_size"] == 40


def test_a_stage_of_another_length_leaves_the_earlier_stages_as_they_are(two_stages, make):
    """Recipe and batches of the first two stages are those of a run without the third."""
    short = make(two_stages)
    long = make(two_stages + datasets("books") + stage("third", "books", 10, **LONG))

    assert long.recipe_until(1) == short.recipe_until(1)
    assert [drawn(long, name) for name in ("first", "second")] == [drawn(short, name) for name in ("first", "second")]


def test_every_batch_size_of_a_ramp_must_divide_over_the_ranks(head, make):
    """Over 4 ranks 4 and 12 do, over 8 neither; the message names the stage's keys."""
    text = head.replace("= 20\n", "= 24\n").replace("local_batch_size = 2", "local_batch_size = 1")
    with pytest.raises(PlanError) as refusal:
        make(two_lengths(text), world_size=8)

    assert make(two_lengths(text), world_size=4).stages[1].steps == 11
    assert str(refusal.value).splitlines()[1:] == [
        f"  - stages.long.global_batch_size: {size} is not a multiple of data-parallel ranks (8) x "
        "stages.long.local_batch_size (1) = 8: change one of the two, or the number of ranks"
        for size in (4, 12)
    ]


def test_the_batch_of_training_is_not_checked_if_every_stage_has_its_own(head, make):
    """20 sequences do not divide over 3 ranks, and no stage has 20."""
    text = head + stage("only", "pile", 2, global_batch_size=6, local_batch_size=1)

    assert make(text, world_size=3).accumulation(make(text, world_size=3).stages[0], 0) == 2


def test_a_batch_size_that_a_stage_does_not_reach_is_noted(head, make):
    """The stage ends after 4 x 256 tokens."""
    note = "stages.long.global_batch_size: the stage ends after 1.024K tokens, before its batch size 12 begins at 2K"
    text = two_lengths(head, "1_000").replace('"1_000" =', '"2_000" =')

    assert [each for each in make(text).notes if "global_batch_size" in each] == [note]
    assert not any("global_batch_size" in each for each in make(two_lengths(head)).notes)


def test_the_json_has_the_batch_memory_and_cost_of_each_stage(head, make):
    """Four times the length: more memory for activations, more FLOPs per token."""
    plan = plan_as_json(make(two_lengths(head)), 2**30)
    short, long = plan["stages"]
    costs = plan["layout"]["stages"]

    assert (short["batch_sizes"], long["batch_sizes"]) == ([[0, 20]], [[0, 4], [4, 12]])
    assert long["flops"] == long["flops_per_token"] * long["tokens"]
    assert long["flops_per_token"] > short["flops_per_token"]
    assert (costs["short"]["accumulation"], costs["long"]["accumulation"]) == ([10], [4, 12])
    assert (
        plan["layout"]["bytes_per_rank"]["total"] == costs["long"]["bytes_per_rank"] > costs["short"]["bytes_per_rank"]
    )
    assert {each["fits"] for each in costs.values()} == {True}


def test_a_rule_of_a_layout_names_the_key_of_the_stage(head, make):
    """Context parallelism over 2 ranks needs lengths that 4 divides; 64 is one, 62 is not."""
    text = head + stage("short", "pile", 10) + stage("long", "pile", 10, seq_len=62)
    with pytest.raises(
        PlanError, match=r"- stages\.long\.seq_len: 62 does not divide into 4 equal parts.*use 60 or 64"
    ):
        make(text, ("parallelism.context_parallel_degree", "2"), world_size=2)


def test_gradients_are_in_float32_in_every_stage_if_any_step_accumulates(head, make):
    """Triton's optimizer reads bfloat16 gradients only in a run without gradient accumulation."""
    whole = {"global_batch_size": 2}
    triton = ("optimizer.implementation", "triton")
    alone = make(head + stage("a", "pile", 1, **whole), triton).footprints["a"]
    with_ramp = make(
        head + stage("a", "pile", 1, **whole) + stage("b", "pile", 9, global_batch_size='{ "0" = 2, "100" = 4 }'),
        triton,
    ).footprints

    assert with_ramp["a"].gradients == with_ramp["b"].gradients > alone.gradients
