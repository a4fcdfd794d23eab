"""gigatoken gives the ids of the `tokenizers` library for every pattern, and gives way where it would not."""

import json
import random
import sys
import time
import types
import unicodedata

import pytest
import tokenizers
from byte_level_tokenizers import PATTERNS, save_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from titan_cpt.data.tokenizer import gigatoken_backend
from titan_cpt.data.tokenizer.gigatoken_backend import pieces
from titan_cpt.data.tokenizer.gigatoken_spec import UnsupportedTokenizerError, to_gigatoken
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer

WORDS = [
    *(" " * length for length in (1, 1, 1, 1, 2, 3, 7)),
    *("\n", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "\u2028"),
    *("the", "a", "Thing", "über", "x", "it's", "'LL", "12345", "½", ".", "...", "中", "。", "한국", "नमस्ते", "e\u0301"),
    *("<|endoftext|>", "<|end", "|>", "<tool>", "😀", "\u0301", "ß", "İ", "ǅ", "\U000105c0", "\u1c89"),
]
TEXTS = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=3)), max_size=60).map("".join)
SLOW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def saved(folder, pattern, **options):
    """Our tokenizer and the library's of a file."""
    library = save_tokenizer(folder / f"{pattern}.json", pattern, **options)
    return load_tokenizer(str(folder / f"{pattern}.json")), library


@pytest.fixture(scope="module", params=[*PATTERNS])
def pair(request, tmp_path_factory):
    """Our tokenizer and the library's, of each pattern."""
    ours, library = saved(tmp_path_factory.mktemp("trained"), request.param, nfc=request.param == "qwen2")
    assert ours.note is None, "gigatoken is used for every one of these"
    return ours, library


@SLOW
@given(text=TEXTS)
def test_every_pattern_gives_the_librarys_tokens(pair, text):
    """Any characters that UTF-8 can hold, new and unassigned ones too."""
    ours, library = pair

    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


@SLOW
@given(text=TEXTS, size=st.integers(1, 20))
def test_a_text_cut_into_pieces_has_the_ids_of_the_whole(pair, text, size):
    """Whatever stands on both sides of a cut."""
    ours, library = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gigatoken_backend, "PIECE_CHARACTERS", size)
        parts = [*pieces(text)]
        found = ours.encode(text)

    assert "".join(parts) == text
    assert found == library.encode(text, add_special_tokens=False).ids
    separate = [number for part in parts for number in library.encode(part, add_special_tokens=False).ids]
    assert found == separate


def test_a_long_text_is_cut_into_pieces_of_about_one_size():
    """In prose with any line ends, and in lines of Chinese; not within one run of a character."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gigatoken_backend, "PIECE_CHARACTERS", 100)
        for unit in ("the theme of the thesis ", "Word.\r\nnext line, and more\r\n", "中文字符。\n"):
            parts = [*pieces(unit * 100)]
            assert 100 < max(map(len, parts)) < 160
            assert len(parts) == pytest.approx(len(unit), abs=len(unit) / 2)
        assert [*pieces("=" * 1000)] == ["=" * 1000]


def test_the_time_to_cut_a_text_without_a_place_to_cut_grows_with_its_length():
    """Eight times the parts take about eight times as long, not sixty-four times."""

    def seconds(parts: int) -> float:
        begin = time.process_time()
        assert len([*gigatoken_backend._cut_again(["= " * 10_000] * parts)]) == 1
        return time.process_time() - begin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gigatoken_backend, "PIECE_CHARACTERS", 100)
        assert seconds(160) < 25 * max(seconds(20), 0.001)


def test_characters_of_the_newest_unicode_version_have_the_librarys_ids(tmp_path):
    """gigatoken has Unicode 17, in which these are letters and digits; the library may have an older version."""
    ours, library = saved(tmp_path, "gpt2")
    texts = [f"a{chr(code)}b 1{chr(code)}2 {chr(code)}!" for code in (0x10940, 0x11DE0, 0xA7CE, 0x1E6C0, 0x16EA0)]

    assert ours.note is None
    for text in texts:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("normalized", [False, True])
def test_the_name_of_a_special_token_hides_the_added_tokens_inside_it_and_at_its_end(tmp_path, normalized):
    """The library matches the name, and so neither "end" in it nor "|>x" at its end, though the name stays text."""
    added = [("end", normalized), ("|>x", normalized), ("  ", normalized)]
    ours, library = saved(tmp_path, "gpt2", added=added)

    assert ours.note is None
    for text in ["a <|endoftext|> b", "end |>x  y", "<|endoftext|>x", "<|pad|>x<|end|>x", "<|endof  text|>"]:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_added_tokens_that_contain_a_place_to_cut_keep_long_texts_whole(tmp_path, monkeypatch):
    """The token "b c" is matched wherever the text could be cut."""
    ours, library = saved(tmp_path, "gpt2", added=[("b c", True), ("x\ny", False)])
    monkeypatch.setattr(gigatoken_backend, "PIECE_CHARACTERS", 3)
    text = "a b c d b c" * 3 + "x\nyx\ny"

    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_text_that_is_not_in_form_nfc_has_the_librarys_ids(tmp_path):
    """Also beside an added token that is matched before normalization."""
    for added in [(), [("<t>", False)]]:
        ours, library = saved(tmp_path, "qwen2", nfc=True, added=added)
        for text in ["e\u0301 a\u0308o\u0323\u0302<t>\u0301 \u212b", "<t>\u0338", "\u1112\u1161\u11ab"]:
            assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_the_cache_is_replaced_when_memory_has_grown(tmp_path, monkeypatch):
    """The ids stay the same, and the encoder is another one."""
    ours, library = saved(tmp_path, "gpt2")
    text = " ".join(str(random.Random(1).random()) for _ in range(50))
    backend = ours._backend[0]
    before = backend._encoder
    monkeypatch.setattr(gigatoken_backend, "_CACHE_CHECK_BYTES", 100)
    monkeypatch.setattr(gigatoken_backend, "_CACHE_LIMIT_BYTES", -(1 << 40))

    assert ours.encode(text) == library.encode(text).ids
    assert backend._encoder is not before
    assert ours.encode(text) == library.encode(text).ids


def spec_of(**changes):
    """A byte-level BPE with one merge."""
    vocab = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = {"type": "BPE", "vocab": {**vocab, "ab": 256, "aab": 257}, "merges": ["a b", "a ab"]}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {"model": model, "pre_tokenizer": byte_level, "normalizer": None, "added_tokens": []}
    for key, value in changes.items():
        (model if key in model or key == "byte_fallback" else spec)[key] = value
    return spec


def added_token(content, **flags):
    return {"id": 300, "content": content, "special": False, "normalized": True, **flags}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"type": "WordPiece"}, "its model is WordPiece"),
        ({"byte_fallback": True}, "its model sets byte_fallback"),
        ({"merges": ["a b", "a b"]}, "contain a pair twice"),
        ({"vocab": spec_of()["model"]["vocab"] | {"aaab": 258}, "merges": ["a b", "a ab", "a aab", "aa ab"]}, "in two"),
        ({"normalizer": {"type": "NFKC"}}, "its normalizer is NFKC"),
        ({"pre_tokenizer": None}, "its pre-tokenizer is none"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
            "neither GPT-2's nor Split's",
        ),
        ({"added_tokens": [added_token("x", single_word=True)]}, "sets single_word"),
        ({"added_tokens": [added_token("xy"), added_token("yz", normalized=False)]}, "overlap"),
    ],
)
def test_a_file_whose_ids_gigatoken_may_not_give_is_refused_with_the_reason(changes, reason):
    """gigatoken itself accepts most of them."""
    with pytest.raises(UnsupportedTokenizerError, match=reason):
        to_gigatoken(spec_of(**changes))


def test_a_split_that_does_not_isolate_is_refused():
    """gigatoken reads only its pattern."""
    split = {"type": "Split", "pattern": {"Regex": PATTERNS["qwen2"][0]}, "behavior": "Removed", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    for parts in ([split], [{**split, "behavior": "Isolated", "invert": True}]):
        both = {"type": "Sequence", "pretokenizers": [*parts, byte_level]}
        with pytest.raises(UnsupportedTokenizerError, match="Split does not isolate"):
            to_gigatoken(spec_of(pre_tokenizer=both))
    json.loads(to_gigatoken(spec_of()).content)


def test_every_character_that_python_calls_normalized_is_unchanged_by_the_librarys_normalizer():
    """The backend skips the library's normalizer for texts that Python calls normalized."""
    normalizer = normalizers.NFC()
    for first in range(0, 0x30000, 0x100):
        text = "".join(
            f"{chr(code)} a{chr(code)}\u0301 " for code in range(first, first + 0x100) if not 0xD800 <= code < 0xE000
        )
        words = [word for word in text.split(" ") if unicodedata.is_normalized("NFC", word)]
        assert [normalizer.normalize_str(word) for word in words] == words
    assert tokenizers.__version__


def test_only_texts_of_characters_that_need_no_check_are_common():
    """Below U+0300 and from U+2002 to U+203F: in form NFC with any neighbor, and known to both libraries."""
    common = [*range(0x300), *range(0x2002, 0x2040)]
    rare = [code for code in (*range(0x300, 0x3000), 0xE000, 0xFFFD, 0x1F600, 0x10FFFF) if code not in common]
    every = "".join(map(chr, common))

    assert gigatoken_backend.is_common(every.encode())
    assert not gigatoken_backend.has_unsettled(every)
    assert all(unicodedata.is_normalized("NFC", f"{chr(code)}{every}{chr(code)}") for code in common)
    for code in rare:
        for text in (chr(code), f"\u2013a{chr(code)}", f"{chr(code)}\u00e4\u2013"):
            assert not gigatoken_backend.is_common(text.encode()), hex(code)


def test_a_gigatoken_that_cannot_be_loaded_gives_way_to_the_library(tmp_path, monkeypatch):
    """Such as one whose binary needs a newer system library; the note says why encoding is slow."""
    library = save_tokenizer(tmp_path / "tokenizer.json", "gpt2")
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", types.ModuleType("without_the_function"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))

    assert tokenizer.encode("the theme of 1 thesis") == library.encode("the theme of 1 thesis").ids
    assert "gigatoken cannot be loaded: cannot import name" in tokenizer.note
