"""Notes on a config and its files; commands/test_plan.py has those on missing files."""

import extended
import pytest
import training

from titan_cpt.data.inventory import take_inventory
from titan_cpt.planning.planner import make_plan

TP = "parallelism.tensor_parallel_degree"


def test_a_dataset_without_validation_is_noted(one_stage, make):
    """Its forgetting is not measured."""
    bare = one_stage.replace('validation = "data/pile-validation"\n', "")

    assert any("datasets.pile: has no validation tokens" in note for note in make(bare).notes)
    assert not any("validation" in note for note in make(one_stage).notes)


def test_packing_of_a_dataset_that_no_stage_trains_on_is_noted(one_stage, make):
    """It has no effect on validation; a dataset that a stage trains on needs no note."""
    other = '\n[datasets.other]\nvalidation = "data/other"\npacking = "best_fit"\n'
    notes = make(one_stage.replace("[training]", f"{other}[training]")).notes
    packed = make(one_stage, ("datasets.pile.packing", '"best_fit"')).notes

    assert any(note.startswith("datasets.other.packing: no stage trains on other, so it has no") for note in notes)
    assert not any(".packing" in note for note in packed)


def test_a_vocabulary_padded_for_tensor_parallelism_is_noted(one_stage, make):
    """257 byte tokens: 384 rows with degree 1, 512 with degree 2. A configured vocabulary size needs no note."""
    padded = make(one_stage, (TP, "2"), world_size=2).notes
    fixed = make(one_stage, (TP, "2"), ("model.vocab_size", "512"), world_size=2).notes
    one_rank = make(one_stage).notes

    assert any("512 rows, padded to 128 x tensor-parallel degree 2 (384 with degree 1)" in note for note in padded)
    assert not any("rows, padded" in note for note in (*fixed, *one_rank))


@pytest.mark.parametrize(("add", "noted"), [(8, False), (9, True)])
def test_another_number_of_further_tokens_than_the_tokenizer_has_is_noted(tmp_path, add, noted):
    """The file has 8, and is used as it is."""
    raw = training.two_stages(training.write_languages(tmp_path), tmp_path)
    raw["datasets"]["de"]["source"] = {"text": str(tmp_path / "de.txt")}
    raw["tokenizer"] = extended.write_tokenizers(tmp_path)
    raw["tokenizer"]["extend"] |= {"dataset": "de", "add": add}
    config = training.config_of(raw)
    notes = make_plan(config, take_inventory(config)).notes

    assert any("extend.add: is 9, and" in note and "has 8 further ids" in note for note in notes) == noted


L1B = {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "mlp_width": 5632}
W4096 = {"layers": 4, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336}


@pytest.mark.parametrize(
    ("sizes", "recipe", "noted"),
    [
        # By hand, torchao's thresholds for rowwise: q, k, v, attention.out and mlp.down have at most 2,048 rows.
        # (2 x 2048^2 + 2 x 256 x 2048 + 2048 x 5632) of (2 x 2048^2 + 2 x 256 x 2048 + 3 x 2048 x 5632) elements
        (L1B, "rowwise", "attention.q, attention.k, attention.v, attention.out, mlp.down (48% of the FLOPs in float8)"),
        (W4096, "rowwise", ""),  # only k and v, 4 %
        (L1B, "tensorwise", ""),  # only k and v, 2 %
        (W4096, "tensorwise", ""),
    ],
)
def test_a_plan_says_where_float8_does_not_pay(one_stage, make, sizes, recipe, noted):
    """The layers and their share of the FLOPs; not with the filter, which leaves them in bfloat16."""
    model = [("model.family", "llama"), *((f"model.{key}", str(value)) for key, value in sizes.items())]
    chosen = [*model, ("float8.recipe_name", recipe)]
    notes = [note for note in make(one_stage, *chosen).notes if note.startswith("float8.")]
    filtered = make(one_stage, *chosen, ("float8.filter_fqns", '["auto_filter_small_kn"]')).notes

    assert len(notes) == bool(noted)
    assert all(noted in note for note in notes)
    assert not any(note.startswith("float8.") for note in filtered)
