"""The plan of a stage that warms up its optimizer state: cost, recipe, refusals."""

import pytest
from plans import stage, text_of

from titan_cpt.errors import ConfigError, PlanError
from titan_cpt.planning.plan_json import plan_as_json

WARM = {"optimizer_state": '"warm:5"'}


def test_the_passes_cost_flops_and_no_part_of_the_budget(head, make):
    """Five of 20 steps of 20 sequences of 16 tokens: a quarter of the stage's FLOPs, in no total."""
    plain, warm = (make(head + stage("a", "pile", 20, **more)) for more in ({}, WARM))
    (before,), (after,) = (plan_as_json(plan)["stages"] for plan in (plain, warm))

    assert after["warm_up_flops"] == pytest.approx(after["flops"] / 4)
    assert (before["warm_up_flops"], before["optimizer_state"], after["optimizer_state"]) == (0, "reset", "warm:5")
    assert {**before, "warm_up_flops": 0, "optimizer_state": 0} == {**after, "warm_up_flops": 0, "optimizer_state": 0}
    assert (
        "optimizer state of a: warmed up at LR 0 on the batches of its first 5 steps; takes as long as these steps "
        "(25.0% of the stage), 1.6K tokens" in text_of(warm)
    )
    assert "warmed up" not in text_of(plain)
    assert plain.fingerprint != warm.fingerprint


def test_passes_cost_what_their_steps_cost_in_a_ramp(head, make):
    """Steps of 4 sequences of 16 tokens up to 128 tokens, then of 20: five passes have 2 x 64 + 3 x 320 tokens."""
    plan = make(head + stage("a", "pile", 20, global_batch_size='{ "0" = 4, "128" = 20 }', **WARM))

    assert plan.stages[0].warm_up_flops == pytest.approx(plan.stages[0].flops_per_token * (2 * 64 + 3 * 320))


def test_more_passes_than_steps_are_refused(head, make):
    """As many are allowed: each batch is read once."""
    assert make(head + stage("a", "pile", 5, **WARM)).stages[0].warm_up_passes == 5
    with pytest.raises(PlanError, match=r"stages.a.optimizer_state: 'warm:5' needs the batches of 5 steps, .* has 4"):
        make(head + stage("a", "pile", 4, **WARM))


@pytest.mark.parametrize("value", ["warm", "warm:", "warm:0", "warm:-1", "warm:1.5", "warm:1e2", "Warm:1", "kep", ""])
def test_other_values_are_refused(head, make, value):
    """With the three that are allowed."""
    with pytest.raises(ConfigError, match='must be "reset", "keep" or "warm:STEPS" with a number of steps'):
        make(head + stage("a", "pile", 5, optimizer_state=f'"{value}"'))


def test_a_stage_that_continues_a_schedule_keeps_its_state(head, make):
    """A warm-up would replace it."""
    second = stage("b", "pile", 5, 'schedule = "continue"', **WARM)
    with pytest.raises(ConfigError, match=r"stages.b.optimizer_state: .* the optimizer state is kept, got 'warm:5'"):
        make(head + stage("a", "pile", 5) + second)
