"""Which optimizer trained the weights of a checkpoint of another run, from its manifest."""

import json

import pytest
from manifests import manifest_with
from plans import stage

from titan_cpt.checkpoint.known.optimizer import check_known_optimizers
from titan_cpt.errors import ConfigError

MUON = {"stages.long.optimizer.name": "Muon", "stages.long.optimizer_state": "reset"}
ADAMW = {"stages.long.optimizer_state": "reset"}


@pytest.fixture
def found(head, make, tmp_path):
    """found(recipe, name, state): the notes on a stage with an optimizer, which begins with a checkpoint's weights."""

    def found(recipe, name, state="reset"):
        record = manifest_with(recipe)
        (tmp_path / "manifest.json").write_text(json.dumps(record))
        text = head + stage("a", "pile", 10, init=f'"checkpoint:{tmp_path}"', optimizer_state=f'"{state}"')
        return list(check_known_optimizers(make(text, ("optimizer.name", name)).stages))

    return found


def test_weights_that_another_optimizer_trained_have_a_note(found):
    """In both directions; a recipe without the key is AdamW's, one without stages (an import) is not known."""
    (to_muon,), (to_adamw,) = found(ADAMW, "Muon"), found(MUON, "AdamW")

    assert to_muon.startswith("stages.a.optimizer: its initial weights were trained with AdamW, and Muon trains them")
    assert to_adamw.startswith("stages.a.optimizer: its initial weights were trained with Muon, and AdamW trains them")
    assert found(ADAMW, "AdamW") == found(MUON, "Muon") == found({}, "Muon") == []


def test_a_kept_state_of_other_rows_has_a_note(found, tmp_path):
    """The checkpoint's stage trained only the head; a stage that resets the state has no note."""
    (note,) = found({**ADAMW, "stages.long.trainable": ["head"]}, "AdamW", "keep")

    assert note.startswith("stages.a.optimizer_state: the state of embedding.weight, blocks.0-")
    assert note.endswith(f"begins anew, as checkpoint:{tmp_path} did not train these in the same rows")
    assert "head.weight" not in note
    assert found({**ADAMW, "stages.long.trainable": ["head"]}, "AdamW") == []


def test_the_state_of_another_optimizer_is_not_kept(found, tmp_path):
    """The message names the checkpoint and both optimizers; a damaged manifest is reported when the stage begins."""
    with pytest.raises(ConfigError) as refused:
        found(ADAMW, "Muon", "keep")

    assert f"needs the state of Muon, which trains this stage, and checkpoint:{tmp_path} has that of AdamW" in str(
        refused.value
    )
    assert found(MUON, "Muon", "keep") == []


def test_a_checkpoint_without_an_optimizer_state_keeps_none(head, make, tmp_path):
    """The plan refuses it, before any stage is trained; with "reset" there is no note."""
    (tmp_path / "manifest.json").write_text(json.dumps(manifest_with({}) | {"kind": "imported"}))

    def planned(state):
        text = head + stage("a", "pile", 10, init=f'"checkpoint:{tmp_path}"', optimizer_state=f'"{state}"')
        return list(check_known_optimizers(make(text).stages))

    with pytest.raises(ConfigError) as refused:
        planned("keep")

    assert "is an import, which has no optimizer state to keep: set stages.a.optimizer_state to" in str(refused.value)
    assert planned("reset") == []
