"""A run whose second stage has a document mask: killed and resumed, with a changed mask, and validated with its own."""

import signal

import pytest
import training
from training import Fault, train

pytestmark = training.THEIR_WARNINGS_IGNORED


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """English across documents, then German and replay within them; sequences have one to three documents."""
    folder = tmp_path_factory.mktemp("documents")
    raw = training.two_stages(training.write_languages(folder), folder)
    raw["model"] = {"family": "llama", "size": "debug", "sliding_window": 24}
    raw["training"]["seq_len"] = 64
    raw["stages"][1] |= {"document_mask": True, "document_positions": True}
    return raw


@pytest.fixture(scope="module")
def unbroken(raw):
    """The finished run."""
    outcome = train(training.write_config(raw, training.Path(raw["job"]["output_dir"]) / "unbroken.toml"))

    assert outcome.status == 0, outcome.output
    assert "stages.german.document_mask: a token attends to a document of" in " ".join(outcome.output.split())
    return training.Path(raw["job"]["output_dir"]) / "run"


def test_a_killed_run_ends_with_the_numbers_of_an_unbroken_one(raw, unbroken, tmp_path):
    """Killed in the second stage before and after a checkpoint: every loss and every weight to the last bit."""
    config = training.write_config(training.changed(raw, job={"output_dir": str(tmp_path)}), tmp_path / "killed.toml")
    faults = (Fault("titan_cpt.train:Trainer.train_step", 15), Fault("titan_cpt.train:Trainer.train_step", 6))
    statuses = [train(config, fault=fault).status for fault in faults]
    last = train(config)

    assert statuses == [-signal.SIGKILL] * 2
    assert last.status == 0, last.output
    assert training.numbers_of(tmp_path / "run") == training.numbers_of(unbroken)
    end = "german/step-00000010"
    assert training.same_bits(training.tensors_of(tmp_path / "run" / end), training.tensors_of(unbroken / end))


def test_a_changed_mask_does_not_resume(raw, unbroken):
    """Both directions: the key of the stage that is trained, and the one of [training], which the first stage takes."""
    stages = [raw["stages"][0], {**raw["stages"][1], "document_mask": False}]
    for name, keys in {"stage": {"stages": stages}, "run": {"training": {"document_mask": True}}}.items():
        outcome = train(training.write_config(training.changed(raw, **keys), unbroken.parent / f"{name}.toml"))

        assert outcome.status == 2, outcome.output
        assert "document_mask" in outcome.output


def test_only_the_masked_stage_differs_from_a_run_without_a_mask(raw, unbroken, tmp_path):
    """The first stage has the same bits; the second one the same batches and other losses."""
    stages = [dict(raw["stages"][0]), dict(raw["stages"][1])]
    del stages[1]["document_mask"], stages[1]["document_positions"]
    plain = training.changed(raw, job={"output_dir": str(tmp_path)}, stages=stages)
    outcome = train(training.write_config(plain, tmp_path / "plain.toml"))
    found, masked = training.numbers_of(tmp_path / "run"), training.numbers_of(unbroken)

    assert outcome.status == 0, outcome.output
    for key in (key for key in found if key[0] == "train"):
        same_loss = found[key][0] == masked[key][0]
        assert found[key][3] == masked[key][3]
        assert same_loss == (key[1] == "english"), key
