"""plan.json and `titan-cpt plan --json`: keys, sums, parameters, FLOPs, and the sequences of a batch."""

import json

import pytest

from titan_cpt.errors import PlanError
from titan_cpt.planning.plan_json import batch_as_json, lr_as_json, plan_as_json


def test_the_json_has_the_documented_keys(two_stages, make):
    """Other programs read these keys; totals are the sums of their parts."""
    answer = json.loads(json.dumps(plan_as_json(make(two_stages))))

    assert {"fingerprint", "model", "stages", "total_tokens", "retraining_tokens"} <= answer.keys()
    assert {"family", "parameters", "parameters_without_embeddings"} <= answer["model"].keys()
    for planned in answer["stages"]:
        assert {"name", "steps", "tokens", "start_lr", "peak_lr", "final_lr", "flops", "datasets"} <= planned.keys()
        assert planned["tokens"] == planned["steps"] * 320
        assert sum(use["tokens"] for use in planned["datasets"].values()) == planned["tokens"]
        assert all(use.keys() == {"tokens", "replayed_tokens", "epochs"} for use in planned["datasets"].values())
    assert answer["total_tokens"] == answer["retraining_tokens"] == 150 * 320
    assert [planned["union_tokens"] for planned in answer["stages"]] == [100 * 320, 150 * 320]
    assert answer["accumulation"] * answer["world_size"] * 2 * 16 == answer["step_tokens"] == 320


@pytest.mark.parametrize(("size", "parameters"), [("405m", 405_334_016), ("10b", 9_642_249_216)])
def test_the_papers_models_have_the_papers_parameters(one_stage, make, size, parameters):
    """Embeddings included; also if the tokenizer does not exist yet."""
    answer = plan_as_json(make(one_stage, ("model.size", size), vocab_size=None))

    assert answer["model"]["parameters"] == parameters
    assert any("tokenizer does not exist yet" in note for note in answer["notes"])


def test_flops_are_counted_per_token(one_stage, make):
    """debug with 257 ids, length 16: 6 x 124,672 parameters in matmuls + 12 x 2 x 64 x 16, for 32,000 tokens."""
    (answer,) = plan_as_json(make(one_stage))["stages"]

    assert answer["flops"] == (6 * 124_672 + 12 * 2 * 64 * 16) * 32_000


def test_a_batch_is_its_sources_and_ordinals(two_stages, make):
    """[[source, ordinal], ...] in batch order: a quarter of the 20 is replay, the first at the second position."""
    plan = make(two_stages)
    batches = [batch_as_json(plan, "second", str(step)) for step in range(2)]

    assert batches[0][:4] == [("german", 0), ("pile", 0), ("german", 1), ("german", 2)]
    assert batches[1][0] == ("german", 15)
    assert [len(batch) for batch in batches] == [20, 20]


@pytest.mark.parametrize(
    ("stage_name", "step", "expected"),
    [
        ("third", "0", "there is no stage 'third'; stages are 'first', 'second'"),
        ("second", "50", "stages.second: has steps 0 to 49, got 50"),
        ("second", "-1", "the 0-based step must be an integer, got '-1'"),
        ("second", "1.5", "the 0-based step must be an integer, got '1.5'"),
    ],
)
def test_a_batch_that_does_not_exist_is_refused(two_stages, make, stage_name, step, expected):
    """Unknown stages, and steps after the end."""
    with pytest.raises(PlanError) as refusal:
        batch_as_json(make(two_stages), stage_name, step)

    assert expected in str(refusal.value)


def test_the_lr_of_a_step_counts_from_1(make, two_stages):
    """Each stage falls from 1e-3 to 1e-4, which its last step has; after the end the LR stays."""
    plan = make(two_stages)
    found = lr_as_json(plan, (1, 50, 100, 1000))

    assert list(found) == ["first", "second"]
    assert (found["first"]["100"], found["first"]["1000"]) == pytest.approx((1e-4, 1e-4))
    assert (found["second"]["50"], found["second"]["100"]) == pytest.approx((1e-4, 1e-4))
    assert found["first"]["1"] == plan.stages[0].lr_at(0)
    assert found["first"]["50"] > found["second"]["50"]
