"""Tokens of every step of a run, from its plan.json."""

from hypothesis import given
from hypothesis import strategies as st

from titan_cpt.common.planned_tokens import PlannedTokens

# Three steps of 2 x 4 tokens and two of 4 x 4; then two steps of 2 x 8.
PLAN = {
    "step_tokens": 8,
    "stages": [
        {"name": "a", "steps": 5, "seq_len": 4, "batch_sizes": [[0, 2], [3, 4]], "flops": 56 * 3},
        {"name": "b", "steps": 2, "seq_len": 8, "batch_sizes": [[0, 2]], "flops": 32 * 5},
    ],
}


def test_tokens_follow_from_the_batch_size_and_the_length_of_each_stage():
    """Counted by hand: 8, 16, 24, 40, 56 tokens in `a`, then 72, 88."""
    tokens = PlannedTokens(PLAN)

    assert [tokens.at("a", step) for step in range(6)] == [0, 8, 16, 24, 40, 56]
    assert [tokens.at("b", step) for step in range(3)] == [56, 72, 88]
    assert [tokens.stages["a"].of_step(step) for step in range(1, 6)] == [8, 8, 8, 16, 16]
    assert tokens.total == 88


def test_flops_of_the_rest_count_each_stages_own_flops_per_token():
    """After step 4 of `a`: one step of 16 tokens at 3 FLOPs; then 32 tokens at 5."""
    tokens = PlannedTokens(PLAN)

    assert tokens.flops_between("a", 4, whole_run=False) == 48
    assert tokens.flops_between("a", 4, whole_run=True) == 48 + 160
    assert tokens.flops_between("b", 2, whole_run=True) == 0


def test_plans_of_older_versions_have_one_number_of_tokens_a_step():
    """They have `step_tokens` only."""
    tokens = PlannedTokens({"step_tokens": 10, "stages": [{"name": "a", "steps": 4}, {"name": "b", "steps": 6}]})

    assert (tokens.at("a", 3), tokens.at("b", 3), tokens.total) == (30, 70, 100)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=5), st.integers(1, 16))
def test_tokens_until_a_step_are_the_sum_of_the_steps_before(phases, seq_len):
    """For any ramp: (steps, batch size) of each phase."""
    sizes = [size for steps, size in phases for _ in range(steps)]
    firsts = [sum(steps for steps, _ in phases[:index]) for index in range(len(phases))]
    pairs = [[first, size] for first, (_, size) in zip(firsts, phases, strict=True)]
    stage = {"name": "a", "steps": len(sizes), "seq_len": seq_len, "batch_sizes": pairs}
    tokens = PlannedTokens({"stages": [stage]})

    assert [tokens.at("a", step) for step in range(len(sizes) + 1)] == [
        seq_len * sum(sizes[:step]) for step in range(len(sizes) + 1)
    ]
