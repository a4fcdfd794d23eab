"""Special tokens: no text becomes one, whatever the model type; ids are those of the `tokenizers` library."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from titan_cpt.data.tokenizer import backends, encoded
from titan_cpt.data.tokenizer.special_tokens import BYTE_NAMES, GuardedSpec, check_added_tokens
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer, vocab_size_of
from titan_cpt.errors import DataError

LETTERS = "\u2581abskun</>[]0xACLSE"
SPECIAL = (("<unk>", True), ("<s>", True), ("</s>", True))


def added(*tokens):
    """Entries of added_tokens: (content, id, special)."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return [
        {"id": number, "content": content, "normalized": not special, "special": special, **flags}
        for content, number, special in tokens
    ]


def saved(folder, model, tokens=(), pre_tokenizer=None, normalizer=None):
    """Path of a tokenizer.json with these added tokens, whatever ids the library would assign."""
    library = Tokenizer(model)
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        library.normalizer = normalizer
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(library.to_str()) | {"added_tokens": added(*tokens)}))
    return str(path)


def unigram(folder, *, fallback, declared=True, normalizer=None):
    """Ids 0 to 2 are special, 3 to 258 are bytes, then come the letters and a piece of two."""
    names = ["<unk>", "<s>", "</s>", *BYTE_NAMES]
    vocab = [(name, 0.0) for name in names] + [(letter, -4.0) for letter in LETTERS] + [("ab", -5.0)]
    tokens = [(name, number, True) for number, (name, _) in enumerate(SPECIAL)] if declared else []
    return saved(folder, models.Unigram(vocab, 0, byte_fallback=fallback), tokens, normalizer=normalizer)


def letters(text, first=259):
    return [first + LETTERS.index(letter) for letter in text]


@pytest.mark.parametrize("fallback", [True, False])
@pytest.mark.parametrize("declared", [True, False])
def test_a_unigram_model_encodes_names_of_special_and_byte_tokens_as_text(tmp_path, fallback, declared):
    """</s>, <s>, <unk> and <0x0A> are spelled in letters, even if the file does not list them as added tokens."""
    ours = load_tokenizer(unigram(tmp_path, fallback=fallback, declared=declared))

    for text in ("</s>", "a<s>b", "<unk><unk>", "a<0xA>"):
        assert ours.encode(text) == letters(text)
    assert ours.encode("<0x0A>") == letters("<0x0A>")
    assert ours.encode("ab</s>") == [259 + len(LETTERS), *letters("</s>")]
    assert ours.encode_documents(["</s>"]).ids.tolist() == [*letters("</s>"), 2]


def test_byte_fallback_works_in_a_text_with_the_name_of_a_byte(tmp_path):
    """A newline and an unknown letter become bytes in the same text in which <0x0A> is spelled."""
    ours = load_tokenizer(unigram(tmp_path, fallback=True))
    e_acute = [3 + 0xC3, 3 + 0xA9]

    assert ours.encode("\n") == [3 + 10]
    assert ours.encode("\u00e9a\n<0x0A>\u00e9") == [*e_acute, 260, 13, *letters("<0x0A>"), *e_acute]
    assert ours.encode_documents(["\u00e9", "<unk>"]).lost == {}


def test_names_that_normalization_produces_are_text_too(tmp_path):
    """NFKC turns full-width characters into plain ones."""
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "<0x0A>")
    ours = load_tokenizer(unigram(tmp_path, fallback=True, normalizer=normalizers.NFKC()))

    assert ours.encode(wide + "\n") == [*letters("<0x0A>"), 13]
    assert ours.encode("".join(chr(ord(letter) + 0xFEE0) for letter in "</s>")) == letters("</s>")


def test_a_word_level_model_does_not_know_the_names_of_its_special_tokens(tmp_path):
    """They are unknown words."""
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "<s>": 3}
    path = saved(tmp_path, models.WordLevel(vocab, unk_token="<unk>"), (), pre_tokenizers.WhitespaceSplit())

    assert load_tokenizer(path).encode("a </s> <s> a") == [2, 0, 0, 2]


def test_a_word_piece_model_does_not_know_the_names_of_its_special_tokens(tmp_path):
    """[CLS] as a word, and </s>, which is only in the vocabulary."""
    vocab = {"[UNK]": 0, "[CLS]": 1, "a": 2, "##b": 3, "</s>": 4}
    model = models.WordPiece(vocab, unk_token="[UNK]")
    path = saved(tmp_path, model, [("[UNK]", 0, True), ("[CLS]", 1, True)], pre_tokenizers.WhitespaceSplit())

    assert load_tokenizer(path).encode("a [CLS] ab </s>") == [2, 0, 2, 3, 0]


@pytest.mark.parametrize("whole", [False, True])
def test_a_bpe_does_not_merge_letters_into_a_special_token(tmp_path, whole):
    """Not by a merge, not by a merge that uses one, and not because the whole piece is a token (ignore_merges)."""
    vocab = {token: number for number, token in enumerate(["<", "s", ">", "<s", "<s>", "a", "</s>", "<s>a", "/"])}
    merges = [("<", "s"), ("<s", ">"), ("<s>", "a")]
    path = saved(tmp_path, models.BPE(vocab, merges, ignore_merges=whole), [("<s>", 4, True)])
    ours = load_tokenizer(path)

    assert ours.encode("a<s>a") == [5, 3, 2, 5]
    assert ours.encode("<s>") == [3, 2]
    assert ours.encode("</s>") == [0, 8, 1, 2]


@pytest.mark.parametrize("whole", [False, True])
def test_a_byte_level_bpe_in_gigatoken_does_not_merge_letters_into_a_special_token(tmp_path, whole):
    """Its pattern does not split before a name of only letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "en", "end", "<|endoftext|>"])}
    model = models.BPE(vocab, [("e", "n"), ("en", "d")], ignore_merges=whole)
    special = [("end", vocab["end"], True), ("<|endoftext|>", vocab["<|endoftext|>"], True)]
    path = saved(tmp_path, model, special, pre_tokenizers.ByteLevel(add_prefix_space=False))
    ours = load_tokenizer(path)

    assert ours.note is None
    assert ours.encode("end") == [vocab["en"], vocab["d"]]


def test_a_byte_name_that_a_bpe_cannot_distinguish_from_the_byte_is_refused(tmp_path):
    """Byte fallback and ignore_merges together; no such file is known. Real bytes are accepted."""
    vocab = {token: number for number, token in enumerate([*BYTE_NAMES, "</s>", "a"])}
    path = saved(tmp_path, models.BPE(vocab, [], ignore_merges=True, byte_fallback=True), [("</s>", 256, True)])
    ours = load_tokenizer(path)

    assert ours.encode("a\n") == [257, 10]
    with pytest.raises(DataError, match="contains the name of a byte token"):
        ours.encode("<0x0A>")


def test_opening_a_tokenizer_finds_a_text_that_becomes_a_special_token(tmp_path, monkeypatch):
    """If the names were not hidden from the model."""
    monkeypatch.setattr(
        "titan_cpt.data.tokenizer.tokenizer.keep_text_as_text",
        lambda spec, eod: GuardedSpec(spec, {"</s>": 2}, 0, ()),
    )

    with pytest.raises(DataError, match="becomes the special token '</s>'"):
        load_tokenizer(unigram(tmp_path, fallback=False)).encode("plain text")


def test_opening_a_tokenizer_checks_every_backend():
    """Not only the `tokenizers` library."""
    guarded = GuardedSpec({}, {"<|endoftext|>": 256}, None, ())
    wrong = backends.BytesBackend([bytes([byte]) for byte in range(256)])
    wrong.encode = lambda texts: encoded.Encoded(np.array([256]), np.array([1]), {})

    with pytest.raises(DataError, match="becomes the special token"):
        backends._check_literals(wrong, guarded, "x.json")


def test_a_special_token_still_hides_other_added_tokens_within_its_name(tmp_path):
    """The library matches the longest added token first, and leaves it as text if it is special."""
    vocab = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -1.0) for letter in "</s>x")]
    tokens = [("<unk>", 0, True), ("</s>", 1, True), ("/s", 7, False)]
    path = saved(tmp_path, models.Unigram(vocab, 0), tokens)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"][2]["normalized"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours = load_tokenizer(path)

    assert ours.encode("</s>") == [2, 3, 4, 5]
    assert ours.encode("x/s") == [6, 7]


# Ids of added tokens

BASE = {"a": 0, "b": 1, "</s>": 2}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([("<x>", 5, True), ("<y>", 6, False)], "'<x>' has id 5 in the file, but 3 in the library.*'<y>' has id 6"),
        ([("<x>", 3, True), ("<y>", 5, True)], "'<y>' has id 5 in the file, but 4 in the library"),
        ([("<x>", 4, True), ("<y>", 3, False)], "'<x>' has id 4 in the file, but 3 in the library"),
        ([("b", 3, False)], "'b' has id 3 in the file, but 1 in the library"),
        ([("<x>", 3, True), ("<x>", 4, True)], "'<x>' has id 4 in the file, but 3 in the library"),
        ([("</s>", 3, True)], "'</s>' has id 3 in the file, but 2 in the library"),
        ([("<x>", 1, True)], "'<x>' has id 1 in the file, but 3 in the library"),
        ([("", 3, True)], "'' has id 3 in the file, but none in the library"),
    ],
)
def test_added_tokens_with_other_ids_in_the_library_are_refused(tmp_path, tokens, message):
    """Gaps, disorder, an id of the vocabulary, duplicates: on open and by the plan."""
    path = saved(tmp_path, models.BPE(BASE, []), tokens)
    library = Tokenizer.from_file(path)

    for read in (load_tokenizer, vocab_size_of):
        with pytest.raises(DataError, match=message):
            read(path)
    assert any(library.token_to_id(content) != number for content, number, _ in tokens)


@pytest.mark.parametrize(
    ("vocab", "tokens"),
    [
        (BASE, [("<x>", 3, True), ("<y>", 4, False)]),
        (BASE, [("b", 1, False), ("<x>", 3, True)]),
        ({"a": 0, "</s>": 9}, [("<x>", 2, False)]),
        ({"a": 0, "</s>": 9}, [("</s>", 9, True), ("<x>", 2, False), ("<y>", 3, True)]),
    ],
)
def test_added_tokens_with_the_same_ids_in_the_library_are_accepted(tmp_path, vocab, tokens):
    """Also in vocabularies with unused ids: size, ids and end of document are the library's."""
    path = saved(tmp_path, models.BPE(vocab, []), tokens)
    ours, library = load_tokenizer(path), Tokenizer.from_file(path)
    numbers = library.get_vocab(with_added_tokens=True)

    assert ours.vocab_size == vocab_size_of(path) == max(numbers.values()) + 1
    assert ours.eod_id == library.token_to_id("</s>")
    for content, number, special in tokens:
        assert library.token_to_id(content) == number
        assert special or ours.encode(f"a{content}") == [0, number]


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True),
    tokens=st.lists(
        st.tuples(st.sampled_from(["p", "q", "v0", "v1", "v2"]), st.integers(0, 9), st.booleans()), max_size=4
    ),
)
def test_a_file_is_accepted_exactly_if_the_library_has_its_ids(ids, tokens):
    """Small vocabularies with any added tokens: our rule, compared with the library."""
    model = {"type": "BPE", "vocab": {f"v{place}": number for place, number in enumerate(ids)}, "merges": []}
    spec = {"version": "1.0", "model": model, "added_tokens": added(*tokens)}
    library = Tokenizer.from_str(json.dumps(spec))
    wanted = {**model["vocab"], **{content: number for content, number, _ in tokens}}
    agree = library.get_vocab(with_added_tokens=True) == wanted
    agree &= all(library.token_to_id(content) == number for content, number, _ in tokens)
    agree &= len({*wanted.values()}) == len(wanted)
    try:
        check_added_tokens("x.json", spec)
        taken = True
    except DataError:
        taken = False

    assert taken == agree


def test_two_tokens_with_one_id_are_refused(tmp_path):
    """The library accepts such a vocabulary, and decodes the id to either token."""
    path = saved(tmp_path, models.BPE(BASE, []))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["vocab"]["c"] = 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))

    with pytest.raises(DataError, match="'b' and 'c' share id 1"):
        load_tokenizer(path)


def test_other_ids_in_the_loaded_library_are_refused(tmp_path, monkeypatch):
    """Whatever the reason, such as another version's rule: its vocabulary is compared when it is loaded."""
    path = saved(tmp_path, models.BPE(BASE, []), [("<x>", 5, True)])
    monkeypatch.setattr("titan_cpt.data.tokenizer.tokenizer.check_added_tokens", lambda path, spec: None)

    with pytest.raises(DataError, match="'<x>' has id 5 in the file, but 3 in the `tokenizers` library"):
        load_tokenizer(path).encode("a")


@pytest.mark.parametrize("declared", [True, False])
def test_html_tags_in_gemmas_vocabulary_neither_end_nor_begin_documents(tmp_path, declared):
    """Gemma 3 has <eos> 1 and <bos> 2, and the HTML tags <s> and </s>, which a text may contain."""
    vocab = {token: number for number, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<s>", "</s>", "a"])}
    tokens = [(token, number, declared or number < 4) for token, number in vocab.items() if token != "a"]
    ours = load_tokenizer(saved(tmp_path, models.BPE(vocab, [], unk_token="<unk>", fuse_unk=False), tokens))

    assert ours.encode_documents(["a"]).ids.tolist() == [6, 1]
    assert ours.with_bos(True).encode_documents(["a"]).ids.tolist() == [2, 6, 1]
    if not declared:
        assert ours.encode("a</s>a") == [6, 5, 6]  # the token of the tag, as in the library


def test_a_declared_special_token_ends_documents_rather_than_an_ordinary_entry(tmp_path):
    """<|endoftext|> is an ordinary entry here, and </s> the special token."""
    tokens = [("<|endoftext|>", 1, False), ("</s>", 2, True)]
    path = saved(tmp_path, models.WordLevel({"a": 0, "<|endoftext|>": 1, "</s>": 2}, unk_token="a"), tokens)

    assert load_tokenizer(path).eod_id == 2
