"""The model of a checkpoint's weights: [model] of its recipe, and the RoPE that its stage trained with."""

import json

import pytest

from titan_cpt.checkpoint.checkpoint_spec import (
    model_differences,
    model_recipe,
    remedies_of,
    rope_change,
    rope_of_checkpoint,
    spec_of_checkpoint,
)
from titan_cpt.errors import CheckpointError
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import Rope, RopeScaling

ROPE = Rope(500.0, RopeScaling(kind="yarn", factor=4.0, original_seq_len=16))


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_manifest_with_a_rope_has_the_model_with_that_rope(family, tmp_path):
    """Without one it is that of [model]; the recipe is not changed."""
    spec = named_size(family, "debug", 257)
    record = json.loads(json.dumps({"recipe": {**spec.as_recipe(), "job.seed": 0}, "rope": ROPE.as_record()}))

    assert spec_of_checkpoint(record, tmp_path) == spec.with_rope(ROPE)
    assert rope_of_checkpoint(record) == ROPE
    assert spec_of_checkpoint({"recipe": record["recipe"]}, tmp_path) == spec
    assert rope_of_checkpoint({"recipe": {}}) == Rope(10_000.0)
    assert "job.seed" not in model_recipe(record)
    assert record["recipe"]["model.rope_base"] == 10_000.0


def test_a_manifest_with_a_damaged_rope_is_refused(tmp_path):
    """The message names the manifest."""
    recipe = named_size("llama", "debug", 257).as_recipe()
    for rope in ({"rope_base": "x"}, {"rope_base": 5.0, "rope_scaling": {"kind": "yarn"}}):
        with pytest.raises(CheckpointError, match=r"manifest\.json: "):
            spec_of_checkpoint({"recipe": recipe, "rope": rope}, tmp_path)


def test_only_keys_that_a_stage_sets_may_differ():
    """An absent setting counts as null; the remedy is for RoPE only."""
    spec = named_size("gpt_neox", "debug", 257)
    other = spec.with_rope(ROPE)
    scaling = ["model.rope_scaling"]

    assert model_differences(spec.as_recipe(), other.as_recipe(), ["model.rope_base", *scaling]) == []
    assert model_differences(spec.as_recipe(), other.as_recipe(), scaling) == ["model.rope_base: 10000.0 -> 500.0"]
    assert model_differences({}, {"model.rope_scaling": None}) == []
    assert list(remedies_of(["model.layers: 2 -> 3"])) == []
    assert len(list(remedies_of(["model.rope_base: 1.0 -> 2.0"]))) == 1
    (rows,) = remedies_of(["model.layers: 2 -> 3", "model.vocab_size: 50304 -> 52352"])
    assert "set model.vocab_size as they have it" in rows
    assert rope_change(spec.rope, spec.rope) is None
