"""Texts of single tokens for messages."""

import json

from titan_cpt.data.tokenizer.ids_fingerprint import byte_tokenizer_json
from titan_cpt.data.tokenizer.token_texts import TokenTexts


def test_strange_texts_are_quoted_on_one_line(tmp_path):
    """Line ends, terminal codes, marks of writing direction, half a character, a long text, an id without a token."""
    spec = byte_tokenizer_json(256)
    strange = ["a\nb\u2028c", "\x1b[31m", "\u202eabc\u200b", "'\"[/red]", "x" * 100, "\u4e2d"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    spec["added_tokens"] += [{"id": 257 + n, "content": text, **flags} for n, text in enumerate(strange)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    texts = TokenTexts(str(tmp_path))
    shown = [texts.quoted(257 + n) for n in range(len(strange))]

    assert shown == [
        "'a\\nb\\u2028c'",
        "'\\x1b[31m'",
        "'\\u202eabc\\u200b'",
        "'\\'\"[/red]'",
        "'" + "x" * 36 + "...",
        "'\u4e2d'",
    ]
    assert [texts.quoted(number) for number in (97, 0xC3, 256, 263, 9999)] == [
        "'a'",
        "b'\\xc3'",
        "'<|endoftext|>'",
        "no token",
        "no token",
    ]
    assert texts.ids == [*range(263)]
    assert TokenTexts("bytes").ids == [*range(257)]
