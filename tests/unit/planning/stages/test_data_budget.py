"""Steps from token budgets, sequences of every source, and epochs."""

import pytest
from plans import paper_batch, stage

from titan_cpt.errors import PlanError
from titan_cpt.planning.plan_json import plan_as_json
from titan_cpt.planning.stages.data_budget import stored_order_notes


@pytest.mark.parametrize(("tokens", "steps"), [("100B", 44_229), ("300B", 132_686), ("2_260_992", 1), ("2_260_993", 2)])
def test_tokens_are_rounded_up_to_whole_steps(head, make, tokens, steps):
    """Batches of 1104 x 2048 = 2,260,992 tokens; an exact multiple is not rounded."""
    plan = make(paper_batch(head) + stage("a", "pile", tokens))

    assert plan.step_tokens == 2_260_992
    assert plan.stages[0].steps == steps


def test_epochs_are_known_if_the_data_exists(two_stages, make):
    """40,000 pile tokens: 32,000 are 0.8 epochs; replay counts towards epochs; missing data has none, and a note."""
    plan = make(two_stages, tokens={"pile": 40_000})
    first, second = (stage["datasets"] for stage in plan_as_json(plan)["stages"])

    assert first["pile"] == {"tokens": 32_000, "replayed_tokens": 0, "epochs": 0.8}
    assert second["pile"] == {"tokens": 4000, "replayed_tokens": 4000, "epochs": 0.1}
    assert second["german"] == {"tokens": 12_000, "replayed_tokens": 0, "epochs": None}
    assert any(note.startswith("data does not exist yet: german;") for note in plan.notes)
    assert plan.sequences == {("pile", 16): 2499, ("german", 16): None}


def test_a_source_shorter_than_a_sequence_is_refused(one_stage, make):
    """A sequence needs seq_len + 1 tokens: 17 are one sequence, 16 are none."""
    with pytest.raises(PlanError, match=r"datasets\.pile\.train: 16 tokens are fewer than one sequence of 16 \+ 1"):
        make(one_stage, tokens={"pile": 16})

    assert make(one_stage, tokens={"pile": 17}).sequences["pile", 16] == 1


def test_a_stored_order_that_ends_before_its_stage_is_noted(two_stages, make):
    """The first stage takes 100 steps x 20 sequences of pile; replay in the second does not count."""
    plan = make(two_stages)
    first, second = plan.stages

    assert stored_order_notes(first, {}) == stored_order_notes(first, {("pile", 16): 2000}) == []
    assert stored_order_notes(second, {("pile", 16): 100}) == []
    assert stored_order_notes(first, {("pile", 16): 1999}) == [
        "stages.first: the stored order of pile has 1999 sequences, and 2000 are needed: it is repeated from its "
        "beginning"
    ]
