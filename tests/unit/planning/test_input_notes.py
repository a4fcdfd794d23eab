"""Notes on a config and its files; commands/test_plan.py has those on missing files."""

TP = "parallelism.tensor_parallel_degree"


def test_a_dataset_without_validation_is_noted(one_stage, make):
    """Its forgetting is not measured."""
    bare = one_stage.replace('validation = "data/pile-validation"\n', "")

    assert any("datasets.pile: has no validation tokens" in note for note in make(bare).notes)
    assert not any("validation" in note for note in make(one_stage).notes)


def test_a_vocabulary_padded_for_tensor_parallelism_is_noted(one_stage, make):
    """257 byte tokens: 384 rows with degree 1, 512 with degree 2. A configured vocabulary size needs no note."""
    padded = make(one_stage, (TP, "2"), world_size=2).notes
    fixed = make(one_stage, (TP, "2"), ("model.vocab_size", "512"), world_size=2).notes
    one_rank = make(one_stage).notes

    assert any("512 rows, padded to 128 x tensor-parallel degree 2 (384 with degree 1)" in note for note in padded)
    assert not any("rows, padded" in note for note in (*fixed, *one_rank))
