"""The tokenizer of a config that extends another: its size before the file exists, files and weights of the base."""

import json
import re

import pytest
from extensions import base_spec, extended
from training import changed, config_of, two_stages, write_languages

from titan_cpt.checkpoint.tokenizer_check import (
    TrainingTokenizer,
    check_planned_tokenizers,
    has_base_tokenizer,
    require_same_tokenizer,
)
from titan_cpt.data.inventory import take_inventory
from titan_cpt.data.tokenizer.ids_fingerprint import ids_fingerprint
from titan_cpt.data.tokenizer.of_config import require_extension, vocab_size_of_config
from titan_cpt.data.tokenizer.tokenizer import fingerprint_of
from titan_cpt.errors import CheckpointError, DataError


@pytest.fixture
def run(tmp_path):
    """Makes a config whose tokenizer, new.json, extends base.json by three tokens."""
    (tmp_path / "base.json").write_text(json.dumps(base_spec()))
    (tmp_path / "new.json").write_text(json.dumps(extended(base_spec())))
    (tmp_path / "other.json").write_text(json.dumps(extended(base_spec(), [("x", "y")])))
    write_languages(tmp_path)
    raw = two_stages(tmp_path, tmp_path / "out")
    raw["datasets"]["en"]["source"] = {"text": [str(tmp_path / "en.txt")]}

    def make(path="new.json", **extend):
        tokenizer = {"path": str(tmp_path / path), "extend": {"base": str(tmp_path / "base.json"), **extend}}
        return config_of(changed(raw, tokenizer=tokenizer))

    make.folder = tmp_path
    return make


def record(folder, name, tokenizer):
    """The record that `prepare` writes beside token files."""
    made = {"fingerprint": fingerprint_of(str(folder / tokenizer)), "vocab_size": 260}
    (folder / f"{name}.json").write_text(json.dumps({"tokenizer": made}))


def test_the_vocabulary_is_known_before_the_extended_file_exists(run):
    inventory = take_inventory(run("missing.json", dataset="en", add=40))
    assert (inventory.base_vocab_size, inventory.vocab_size) == (257, 297)


def test_the_vocabulary_of_an_extended_file_is_its_own(run):
    inventory = take_inventory(run())
    assert (inventory.base_vocab_size, inventory.vocab_size) == (257, 260)


def test_a_file_that_does_not_extend_the_base_is_refused(run):
    (run.folder / "new.json").write_text(json.dumps(extended(base_spec())).replace('"a": 97', '"a": 300'))
    with pytest.raises(DataError, match="does not extend"):
        vocab_size_of_config(run())


def test_a_plan_needs_no_base_and_training_does(run):
    (run.folder / "base.json").unlink()
    inventory = take_inventory(run("missing.json", dataset="en", add=40))
    assert (inventory.base_vocab_size, inventory.vocab_size) == (1, 41)
    assert [note for note in inventory.notes if note.startswith("tokenizer.extend.base does not exist yet: ")]
    assert take_inventory(run()).vocab_size == 260
    with pytest.raises(DataError, match=r"base\.json: No such file"):
        require_extension(run())


def test_an_extension_that_cuts_words_otherwise_is_noted(run):
    spec = extended(base_spec())
    spec["normalizer"] = {"type": "NFC"}
    (run.folder / "new.json").write_text(json.dumps(spec))
    (note,) = [each for each in take_inventory(run()).notes if each.startswith("tokenizer.path: ")]
    assert "its normalizer is not that of the base" in note


def test_token_files_of_the_base_and_of_the_extension_are_used_together_and_no_others(run):
    record(run.folder, "en", "base.json")
    record(run.folder, "de", "new.json")
    assert take_inventory(run()).base_vocab_size == 257
    record(run.folder, "de", "other.json")
    message = (
        r"datasets\.de\.train: was made with another tokenizer.* that of tokenizer\.extend\.base = .* is [0-9a-f]{12}"
    )
    with pytest.raises(DataError, match=message):
        take_inventory(run())


def test_files_of_two_extensions_are_refused_while_the_extended_file_is_missing(run):
    record(run.folder, "en", "base.json")
    record(run.folder, "de", "new.json")
    take_inventory(run("missing.json", dataset="en", add=3))
    record(run.folder, "en", "other.json")
    with pytest.raises(DataError, match="was made with another tokenizer"):
        take_inventory(run("missing.json", dataset="en", add=3))


@pytest.mark.parametrize(("made_with", "is_base"), [("base.json", True), ("new.json", False), (None, True)])
def test_weights_of_the_base_and_of_the_extension_are_accepted(run, made_with, is_base):
    path = None if made_with is None else str(run.folder / made_with)
    weights = None if path is None else TrainingTokenizer("there", fingerprint_of(path), ids_fingerprint(path))
    note = require_same_tokenizer("german", "checkpoint:x", weights, run())
    assert (note is None) == (weights is not None)
    assert note is None or note.endswith("is unknown; assuming that it is " + str(run.folder / "base.json"))
    assert has_base_tokenizer(weights, run()) is is_base


def test_the_plan_notes_that_rows_of_new_tokens_that_weights_have_are_replaced(run):
    """Weights of the extension, with new_rows set; not those of the base, and not without the key."""
    folder = run.folder / "released"
    folder.mkdir()

    def notes(tokenizer, **stage):
        (folder / "tokenizer.json").write_bytes((run.folder / tokenizer).read_bytes())
        raw = two_stages(run.folder, run.folder / "out")
        raw["stages"] = [{**raw["stages"][0], "init": f"hf:{folder}", **stage}]
        extend = {"base": str(run.folder / "base.json")}
        config = config_of(changed(raw, tokenizer={"path": str(run.folder / "new.json"), "extend": extend}))
        return list(check_planned_tokenizers(config))

    (note,) = notes("new.json", new_rows="mean")
    assert note.endswith(
        "have rows for the new tokens already: new_rows = 'mean' replaces them; remove it to keep them"
    )
    assert notes("new.json") == notes("base.json", new_rows="mean") == []


def test_weights_of_a_third_tokenizer_are_refused(run):
    weights = TrainingTokenizer("there", fingerprint_of(str(run.folder / "other.json")))
    base = re.escape(str(run.folder / "base.json"))
    with pytest.raises(CheckpointError, match=f"with another tokenizer .* and than tokenizer.extend.base = '{base}'"):
        require_same_tokenizer("german", "checkpoint:x", weights, run())
