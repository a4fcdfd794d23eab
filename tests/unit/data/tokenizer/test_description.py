"""What `titan-cpt tokenizer inspect` says about a tokenizer."""

import json

from titan_cpt.data.tokenizer.description import tokenizer_parts

from .test_extension import base_spec, extended


def test_the_parts_of_a_tokenizer_are_named(tmp_path):
    spec = base_spec() | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}
    (tmp_path / "base.json").write_text(json.dumps(spec))
    found = tokenizer_parts(str(tmp_path / "base.json"))
    assert (found["model"], found["vocab_size"], found["byte_level"]) == ("BPE", 257, True)
    assert (found["normalizer"], found["pre_tokenizer"]) == ("NFC, Lowercase", "ByteLevel")
    assert (found["end_of_document"], found["begin_of_document"]) == ("<|endoftext|>", None)
    assert found["special_tokens"] == ["<|endoftext|>"]
    assert "extends" not in found


def test_the_new_tokens_of_an_extension_are_shown_as_text(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps(base_spec()))
    (tmp_path / "new.json").write_text(json.dumps(extended(base_spec(), added=["<x>"])))
    found = tokenizer_parts(str(tmp_path / "new.json"), str(tmp_path / "base.json"))["extends"]
    assert (found["base_vocab_size"], found["new_tokens"]) == (257, ["th", "the", " the", "<x>"])


def test_the_byte_tokenizer_has_no_parts():
    assert tokenizer_parts("bytes")["model"] == "bytes"
