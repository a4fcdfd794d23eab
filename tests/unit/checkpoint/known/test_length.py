"""How long the sequences are that weights from outside of a run know, from their files."""

import json

from manifests import manifest_with
from plans import stage

from titan_cpt.checkpoint.known.length import length_notes


def test_the_length_of_a_release_is_its_max_position_embeddings(head, make, tmp_path):
    """Of a folder; a hub name, a damaged file and a release without the number have no note."""
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 32}))

    def noted(init):
        return list(length_notes(make(head + stage("a", "pile", 10, seq_len=64, init=f'"{init}"')).stages))

    (note,) = noted(f"hf:{tmp_path}")
    assert note.startswith("stages.a: trains on sequences of 64 tokens with the RoPE of weights that know 32")
    assert noted("hf:nowhere/model") == []
    for damaged in ("{", "{}", '{"max_position_embeddings": "32"}'):
        (tmp_path / "config.json").write_text(damaged)
        assert noted(f"hf:{tmp_path}") == []


def test_the_length_of_a_checkpoint_is_that_of_the_stages_that_trained_it(head, make, tmp_path):
    """From its manifest."""
    record = manifest_with({"training.seq_len": 16, "stages.long.init": "random", "stages.long.seq_len": 32})
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    init = f'"checkpoint:{tmp_path}"'

    for seq_len, noted in ((32, 0), (64, 1)):
        plan = make(head + stage("a", "pile", 10, seq_len=seq_len, init=init))
        assert len(list(length_notes(plan.stages))) == noted
