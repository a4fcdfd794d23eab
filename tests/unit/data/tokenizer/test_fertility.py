"""Fertility counted by hand on the byte tokenizer."""

import json

from titan_cpt.data.tokenizer.fertility import fertility
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer

from .test_extension import base_spec, extended


def test_words_bytes_and_tokens_of_a_text():
    counted = fertility(load_tokenizer("bytes"), ["Größe und\nMaß", "b"])
    assert (counted.words, counted.bytes, counted.tokens, counted.new_tokens) == (4, 17, 17, 0)
    assert counted.as_json()["tokens_per_word"] == 17 / 4
    assert counted.as_json()["bytes_per_token"] == 1.0


def test_new_tokens_are_counted(tmp_path):
    (tmp_path / "new.json").write_text(json.dumps(extended(base_spec())))
    counted = fertility(load_tokenizer(str(tmp_path / "new.json")), ["the the", "th"], first_new=257)
    assert (counted.tokens, counted.new_tokens, counted.distinct_new) == (3, 3, 3)


def test_a_text_without_words_has_no_ratio():
    assert fertility(load_tokenizer("bytes"), []).as_json()["tokens_per_word"] is None
