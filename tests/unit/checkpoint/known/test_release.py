"""Which release a stage starts from: by hub name, by a folder's name, by model.size; never by shapes."""

import json

import pytest
from manifests import manifest_with
from plans import stage

from titan_cpt.checkpoint.known.length import length_notes
from titan_cpt.checkpoint.known.release import known_release_notes, released_weights
from titan_cpt.config.load import load_config


@pytest.fixture
def weights(head, write):
    """weights(init, *overrides): the release of an `init`, with a config whose size is no release."""

    def weights(init, *overrides):
        return released_weights(init, load_config(write(head + stage("a", "pile", 10, init='"hf:x/y"')), overrides))

    return weights


def test_a_hub_name_decides_with_its_revision(weights):
    """In any case; a fine-tuned model of another owner is unknown, and new weights are none."""
    found = weights("hf:eleutherai/Pythia-160m-deduped@step1000")

    assert (found.release.size, found.revision) == ("160m", "step1000")
    assert weights("hf:EleutherAI/pythia-160m").revision == "main"
    assert weights("hf:someone/pythia-160m").release is None
    assert weights("random") is None


def test_a_folder_is_known_by_its_name_and_by_the_cache_of_the_hub(weights, tmp_path):
    """NAME or NAME@REVISION; a snapshot in the cache has the name, but a commit for its revision."""
    cached = tmp_path / "models--EleutherAI--pythia-160m" / "snapshots" / "0123abc"
    folders = [tmp_path / "pythia-160m", tmp_path / "pythia-160m@step1000", cached]
    for folder in folders:
        folder.mkdir(parents=True)
    found = [weights(f"hf:{folder}") for folder in folders]

    assert [each.release.size for each in found] == ["160m"] * 3
    assert [each.revision for each in found] == [None, "step1000", None]


def test_another_folder_is_the_release_of_model_size_unless_model_changes_it(weights, tmp_path):
    """The user says which: Llama 3 and 3.1 have the same shapes. Its revision is not known."""
    folder = tmp_path / "base"
    folder.mkdir()
    init, size = f"hf:{folder}", ("model.size", "160m")
    found = weights(init, size)

    assert (found.release.size, found.revision) == ("160m", None)
    assert found.name == f'{folder}, by model.size = "160m" the release EleutherAI/pythia-160m,'
    assert weights(init).release is None
    assert weights(init, size, ("model.layers", "3")).release is None
    assert weights(init, size, ("model.vocab_size", "60000")).release.size == "160m"


def test_an_import_is_the_release_whose_name_it_recorded(weights, tmp_path):
    """From its manifest; a checkpoint of a run is none, and neither is a damaged one."""
    record = manifest_with({"training.seq_len": 16})
    imported = {**record, "released": {"name": "EleutherAI/pythia-160m@step2", "config": {}}}
    init = f"checkpoint:{tmp_path}"

    (tmp_path / "manifest.json").write_text(json.dumps(imported))
    found = weights(init)
    assert (found.release.size, found.revision) == ("160m", "step2")
    for other in (json.dumps(record), "{"):
        (tmp_path / "manifest.json").write_text(other)
        assert weights(init) is None


def test_the_notes_of_a_plan_name_the_release(head, make, write):
    """With its tokenizer's 50,277 ids against the run's; an extended tokenizer has other ids by intention."""
    text = head + stage("a", "pile", 10, init='"hf:EleutherAI/pythia-160m"')
    config = load_config(write(text))
    notes = list(known_release_notes(config, make(text).stages, 257))

    assert notes[0].startswith("stages.a.init: EleutherAI/pythia-160m was trained on 299.9B tokens at a peak LR of ")
    assert "has 50,277 ids" in notes[-1]
    extended = load_config(write(text), [("tokenizer.path", "more.json"), ("tokenizer.extend.base", "base.json")])
    assert [note for note in known_release_notes(extended, make(text).stages, 257) if "ids" in note] == []


def test_the_length_of_a_release_on_the_hub_is_that_of_its_training(head, make):
    """Pythia knows 2,048 tokens, which a longer stage exceeds; of an unknown model nothing is assumed."""
    stages = make(head + stage("a", "pile", 10, seq_len=4096, init='"hf:EleutherAI/pythia-160m@step1000"')).stages
    unknown = make(head + stage("a", "pile", 10, seq_len=4096, init='"hf:no/name"')).stages
    (note,) = length_notes(stages)

    assert note.startswith("stages.a: trains on sequences of 4,096 tokens with the RoPE of weights that know 2,048")
    assert list(length_notes(unknown)) == []


def test_an_import_from_another_trainer_is_no_release_and_has_the_lr_that_it_recorded(head, make, write, tmp_path):
    """Also if its folder has the name of a release, whose weights the other trainer has changed; a jump has a note."""
    trained_by = {"trainer": "litgpt", "step": 1200, "tokens": 34_000, "next_lr": 1e-5}
    record = manifest_with({}) | {"kind": "imported", "released": {"name": "there/pythia-160m", "config": {}}}
    (tmp_path / "manifest.json").write_text(json.dumps(record | {"trained_by": trained_by}))
    text = head + stage("a", "pile", 10, init=f'"checkpoint:{tmp_path}"', lr='schedule = "constant", max = 1e-3')
    config = load_config(write(text))
    summary, jump = known_release_notes(config, make(text).stages, None)
    (tmp_path / "manifest.json").write_text(json.dumps(record | {"trained_by": {"trainer": "litgpt"}}))
    unknown, *others = known_release_notes(config, make(text).stages, None)

    assert summary.startswith(
        "stages.a.init: there/pythia-160m was trained with litgpt for 1,200 steps, on 34K tokens; it was left at "
        "LR 1e-05. This stage adds "
    )
    assert "without a warm-up, after an LR of 1e-05: the loss will spike" in jump
    assert "was trained with litgpt; at which LR it was left is not recorded. This stage adds" in unknown
    assert others == []
