"""The Tokenizer gives exactly the ids of the `tokenizers` library, through gigatoken or not."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from titan_cpt.data.tokenizer.byte_level import token_bytes
from titan_cpt.data.tokenizer.gigatoken_backend import GigatokenBackend
from titan_cpt.data.tokenizer.gigatoken_spec import UnsupportedTokenizerError, to_gigatoken
from titan_cpt.data.tokenizer.huggingface_backend import HuggingFaceBackend
from titan_cpt.data.tokenizer.special_tokens import GuardedSpec
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer, vocab_size_of
from titan_cpt.data.tokenizer.train_bpe import train_bpe
from titan_cpt.errors import DataError

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "def function(self, value):\n        return value + 1\n\n\nclass Thing:\n    pass\n",
    "Der Zug fährt über die Brücke, und das Öl läuft aus. Größe: 1.234,50 €. Er sagt: „Schön!“",
    "It's what we'll do; they've said I'm wrong, haven't they? 2024-01-02 12:34:56, x = 1000000",
    "中文字符 日本語です 한국어 مرحبا שלום नमस्ते 😀👨‍👩‍👧 \t\ttabs\r\nand lines\r\n\r\n",
    "the theme of the thesis then there these those that this than them",
    "e\u0301 a\u0308 o\u0302\u0323  ----====  <|endoftext|> </s> <tool>x</tool>",
] * 3
PIECES = [
    *(" " * count for count in (1, 1, 1, 2, 3, 4, 5, 8, 23, 24, 25, 26, 48, 49, 50, 73)),
    *(
        "\n",
        "\n\n",
        "\t",
        "\t\t\t",
        "\r\n",
        "\r",
        "\u00a0",
        "\u3000",
        "\u2003",
        "\u200b",
        "\x00",
        "\x1c",
        "\x85",
        "\ufeff",
    ),
    *(
        "the",
        "Thing",
        "über",
        "Größe",
        "def",
        "1",
        "12345",
        "½",
        "Ⅷ",
        "'s",
        "'LL",
        "'",
        "\u2019t",
        "it's",
        "\u017f",
        "\u212a",
    ),
    *(".", "...", "--", "==", "_", "x_y", "<|endoftext|>", "<|padding|>", "<tool>", "</tool>", "<tool", "</s>"),
    *("中文", "字", "日本語です", "한국", "각", "مرحبا", "नमस्ते", "😀", "👨‍👩‍👧", "🇩🇪", "\U0001d4d0", "\U0010ffff"),
    *(
        "e\u0301",
        "\u0301",
        "o\u0323\u0302",
        "o\u0302\u0323",
        "Å",
        "\u0338",
        ">\u0338",
        "ffi",
        "ß",
        "a",
        "b",
        "aaaa",
        "abab",
    ),
]
TEXTS = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs", "Mn", "Mc"]), max_size=4)),
    max_size=25,
).map("".join)  # combining marks from PIECES only: those younger than Unicode 9 are ordered by Python's newer tables
SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def trained(folder: Path, kind: str) -> Path:
    """A small BPE of one of the usual kinds, trained by the `tokenizers` library."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "llama3":
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if kind in ("neox", "tools"):
        tokenizer.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<|padding|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "neox":
        tokenizer.add_tokens([AddedToken(" " * length, normalized=True) for length in range(24, 1, -1)])
    if kind == "tools":
        tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=True)])
        tokenizer.add_tokens([AddedToken("o\u0302\u0323", normalized=True), AddedToken("<tool>x", normalized=False)])
    path = folder / f"{kind}.json"
    tokenizer.save(str(path))
    return path


def reference(path: Path) -> Tokenizer:
    """The library's tokenizer, which encodes names of special tokens as text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def edited(path: Path, **changes: object) -> Path:
    """The same file with changed keys of its top level or its model."""
    spec = json.loads(path.read_text())
    for key, value in changes.items():
        (spec["model"] if key in spec["model"] else spec)[key] = value
    path.write_text(json.dumps(spec))
    return path


@pytest.fixture(scope="module", params=["gpt2", "neox", "llama3", "tools"])
def pair(request, tmp_path_factory):
    """Our tokenizer and the library's, of each kind."""
    path = trained(tmp_path_factory.mktemp("trained"), request.param)
    ours = load_tokenizer(str(path))
    assert ours.note is None, "gigatoken is used for every one of these"
    return ours, reference(path)


@SLOW
@given(text=TEXTS)
def test_gigatoken_gives_the_librarys_tokens(pair, text):
    """Runs of white space, scripts, emoji, combining marks and names of special tokens, in any order."""
    ours, library = pair

    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_long_texts_and_batches_give_the_librarys_tokens(pair):
    """Many pieces in one text, and many texts in one call."""
    ours, library = pair
    draw = random.Random(1)
    texts = ["".join(draw.choices(PIECES, k=draw.randrange(400))) for _ in range(60)]
    expected = [part.ids for part in library.encode_batch(texts, add_special_tokens=False)]

    assert ours.encode_batch(texts) == expected
    assert ours.encode_batch([]) == []


def test_only_the_end_of_a_document_is_the_end_of_document_id(pair):
    """One per document, none from its name in a text, empty texts included."""
    ours, _ = pair
    texts = ["a <|endoftext|> b", "", "c"]
    ids, lengths, _ = ours.encode_documents(texts)

    assert np.flatnonzero(ids == ours.eod_id).tolist() == (np.cumsum(lengths) - 1).tolist()
    assert ids.tolist() == [number for text in texts for number in [*ours.encode(text), ours.eod_id]]


@SLOW
@given(text=TEXTS)
def test_decoding_gives_the_text_and_byte_lengths_add_up(pair, text):
    """Decoding gives the (normalised) text; the byte lengths of its ids add up to its bytes."""
    ours, library = pair
    normal = library.normalizer.normalize_str(text) if library.normalizer else text
    assume("\u1ed9" not in normal)  # the added token of "tools" that is not in normal form itself
    assume("<tool>\u0338" not in text)  # an added token matched before normalization, which would change its end
    ids = ours.encode(text)

    assert ours.decode(ids) == normal
    assert int(ours.token_byte_lengths()[ids].sum()) == len(normal.encode())


def test_special_tokens_have_zero_bytes_and_decode_to_their_name(pair):
    """Bits per byte must not count them; a reader of a stream must see them."""
    ours, _ = pair

    assert ours.token_byte_lengths()[ours.eod_id] == 0
    assert len(ours.token_byte_lengths()) == ours.vocab_size
    assert ours.decode([*ours.encode("a"), ours.eod_id]) == "a<|endoftext|>"


def test_the_vocabulary_size_is_the_largest_id_plus_one(pair):
    """Added tokens count, and the plan has the same size."""
    ours, library = pair
    largest = max(library.get_vocab(with_added_tokens=True).values())

    assert ours.vocab_size == vocab_size_of(ours.name) == largest + 1
    with pytest.raises(DataError, match=f"id {largest + 1}; allowed are ids from 0 to {largest}"):
        ours.decode([largest + 1])


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_a_million_line_ends_give_the_librarys_tokens(tmp_path, kind):
    """They overflow the stack of regular expressions; their neighbours in the batch keep their places."""
    path = trained(tmp_path, kind)
    texts = ["before ", "x" + "\n" * 1_000_000 + "y", " after"]
    ours, library = load_tokenizer(str(path)), reference(path)

    assert ours.encode_batch(texts) == [library.encode(text, add_special_tokens=False).ids for text in texts]


@settings(max_examples=100, deadline=None)
@given(
    choices=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=14),
    swap=st.integers(0, 60),
    whole=st.booleans(),
)
@example(choices=[(0, 1), (2, 0)], swap=0, whole=False)
def test_any_merge_list_is_converted_exactly_or_refused(choices, swap, whole):
    """Merge lists that no training would give, against the library on every string of up to seven of two letters."""
    tokens, merges = ["a", "b"], []
    for left, right in choices:
        pair = tokens[left % len(tokens)], tokens[right % len(tokens)]
        if pair not in merges:
            merges.append(pair)
            tokens += [] if "".join(pair) in tokens else ["".join(pair)]
    if swap + 1 < len(merges):  # a token may even be used before it is made
        merges[swap], merges[swap + 1] = merges[swap + 1], merges[swap]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, *tokens[2:], "bba", "aab"])}
    library = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    name_of = {number: token for token, number in vocab.items()}
    table = [token_bytes(name_of.get(number, "")) for number in range(max(name_of) + 1)]
    words = [f"{number:b}"[1:].replace("0", "a").replace("1", "b") for number in range(2, 2**8)]

    guarded = GuardedSpec(json.loads(library.to_str()), {}, None, ())
    try:
        backend = GigatokenBackend(guarded, table, lambda: pytest.fail("unused"))
    except UnsupportedTokenizerError:
        return
    ids, lengths, _ = backend.encode(words)
    expected = [part.ids for part in library.encode_batch(words)]
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer is Lowercase"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "pre-tokenizer"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ]}}, "pre-tokenizer"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]}}, None),
        ({"ignore_merges": False, "merges": [["a", "b"], ["c", "a"], ["b", "c"], ["ca", "b"], ["c", "ab"]]}, None),
    ],
)  # fmt: skip
def test_tokenizers_that_gigatoken_cannot_encode_use_the_library_with_a_note(tmp_path, changes, reason):
    """The ids are always the library's."""
    path = edited(trained(tmp_path, "gpt2"), **changes)
    if "merges" in changes:
        spec = json.loads(path.read_text())
        spec["model"]["vocab"] |= {token: 600 + n for n, token in enumerate(["ab", "ca", "bc", "cab"])}
        path.write_text(json.dumps(spec))
    ours = load_tokenizer(str(path))

    for text in ["Hello  World, 123 cab abc cabcab", "x_y <|endoftext|>"]:
        assert ours.encode(text) == reference(path).encode(text, add_special_tokens=False).ids
    assert reason is None or reason in (ours.note or "")


def test_ids_that_lack_bytes_of_the_text_are_replaced_by_the_librarys(tmp_path):
    """The check of every text: here one id counts as a special token, which stands for no bytes of a text."""
    spec = json.loads(trained(tmp_path, "gpt2").read_text())
    library = reference(tmp_path / "gpt2.json")
    table = [library.decode([number], skip_special_tokens=False).encode() for number in range(600)]
    used = []

    def fallback():
        used.append(True)
        return HuggingFaceBackend(spec, "gpt2.json", GuardedSpec(spec, {}, None, ()), table)

    backend = GigatokenBackend(GuardedSpec(spec, {"q": library.token_to_id("q")}, None, ()), table, fallback)

    assert backend.encode(["the a"]).ids.tolist() == library.encode("the a").ids
    assert not used
    assert backend.encode(["the a", "q b"]).ids.tolist() == [*library.encode("the a").ids, *library.encode("q b").ids]
    assert used


def test_a_backend_that_differs_on_the_test_strings_is_not_used(tmp_path, monkeypatch):
    """The last check: other ids than the library's are never given."""
    path = trained(tmp_path, "gpt2")
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    wrong = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    monkeypatch.setattr(
        "titan_cpt.data.tokenizer.gigatoken_backend.to_gigatoken",
        lambda spec: to_gigatoken({**spec, "pre_tokenizer": wrong}),
    )
    ours = load_tokenizer(str(path))

    assert ours.encode("It's  so") == reference(path).encode("It's  so").ids
    assert "gigatoken encodes" in (ours.note or "")


def test_a_text_never_becomes_an_end_of_document_that_is_not_declared_special(tmp_path):
    """Some files list it as an ordinary added token."""
    path = trained(tmp_path, "gpt2")
    spec = json.loads(path.read_text())
    spec["added_tokens"] = [{**token, "special": False} for token in spec["added_tokens"]]
    path.write_text(json.dumps(spec))
    ours = load_tokenizer(str(path))

    assert ours.eod_id == 0
    assert 0 not in ours.encode("a <|endoftext|> b")
    assert ours.token_byte_lengths()[0] == 0


def test_sentencepiece_like_files_use_the_library(tmp_path):
    """A Llama-2-like BPE over characters with bytes for the rest: its own tokens, and bytes that add up."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {token: 259 + number for number, token in enumerate(["▁", "a", "b", "▁a", "ab"])}
    library = Tokenizer(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    text = "ab ab é </s>"

    assert ours.encode("ab a") == [263, 262]
    assert ours.eod_id == 2
    assert 2 not in ours.encode(text)
    assert int(ours.token_byte_lengths()[ours.encode(text)].sum()) == len(text.encode())
    assert "the `tokenizers` library" in (ours.note or "")


def test_the_byte_tokenizer_maps_bytes_to_themselves():
    """256 byte values and the end of a document."""
    tokenizer = load_tokenizer("bytes")

    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eod_id, vocab_size_of("bytes"), tokenizer.note) == (257, 256, 257, None)
    assert tokenizer.token_byte_lengths().tolist() == [1] * 256 + [0]
    assert tokenizer.encode_documents(["a", "", "bc"])[0].tolist() == [97, 256, 256, 98, 99, 256]
    assert tokenizer.decode([97, 0xC3, 0xA9, 256, 0xFF]) == "aé<|endoftext|>\ufffd"


def test_the_fingerprint_depends_on_the_content(tmp_path):
    """A copy has the same one, another vocabulary another; the byte tokenizer has one too."""
    (tmp_path / "elsewhere").mkdir()
    first, second = trained(tmp_path, "gpt2"), trained(tmp_path / "elsewhere", "gpt2")
    prints = [load_tokenizer(name).fingerprint for name in (str(first), str(second), "bytes")]

    assert prints[0] == prints[1] != prints[2]
    assert load_tokenizer(str(trained(tmp_path, "neox"))).fingerprint != prints[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file.*'bytes', a tokenizer.json, or the folder"),
        ("\x00", "is not JSON"),
        ("[]", "has no model.vocab"),
        ('{"model": {"vocab": {}}}', "has no model.vocab"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<x>", "special": true}]}', "'<x>'"),
    ],
)
def test_files_that_are_not_tokenizers_are_refused(tmp_path, content, message):
    """With the path, and what is allowed."""
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(DataError, match=message):
        load_tokenizer(str(path))


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_half_a_surrogate_pair_is_refused(tmp_path, name):
    """It is not a character, and no text of a file has one."""
    tokenizer = load_tokenizer(name if name == "bytes" else str(trained(tmp_path, name)))

    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_a_trained_tokenizer_has_the_requested_size(tmp_path):
    """<|endoftext|> is its special token, it uses gigatoken, and no other file remains."""
    train_bpe(iter(CORPUS), 400, tmp_path / "new" / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "new"))

    assert (tokenizer.vocab_size, tokenizer.note) == (400, None)
    assert tokenizer.decode([tokenizer.eod_id]) == "<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode("Größe \x00 中")) == "Größe \x00 中"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(("size", "message"), [(256, "the minimum is 257"), (5000, "the texts yield")])
def test_a_vocabulary_size_that_is_not_possible_is_refused(tmp_path, size, message):
    """Smaller than the bytes, or larger than the texts yield; no file remains."""
    with pytest.raises(DataError, match=message):
        train_bpe(["some text"], size, tmp_path / "tokenizer.json")

    assert list(tmp_path.iterdir()) == []


def test_a_plan_reads_the_vocabulary_size_without_the_libraries(tmp_path):
    """Opening a tokenizer imports neither gigatoken nor tokenizers nor torch."""
    path = trained(tmp_path, "neox")
    code = (
        "import sys; from titan_cpt.data.tokenizer.tokenizer import load_tokenizer, vocab_size_of;"
        f"print(vocab_size_of({str(path)!r}), load_tokenizer({str(path)!r}).eod_id,"
        "[name for name in ('gigatoken', 'tokenizers', 'torch') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed.split("\n")[0] == f"{reference(path).get_vocab_size()} 0 []"


def test_without_the_library_gigatoken_works_and_the_rest_names_the_package(tmp_path, monkeypatch):
    """A broken or missing `tokenizers`."""
    quick, slow = trained(tmp_path, "neox"), edited(trained(tmp_path, "gpt2"), normalizer={"type": "Lowercase"})
    expected = reference(quick).encode("a   b").ids
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert load_tokenizer(str(quick)).encode("a   b") == expected
    with pytest.raises(DataError, match=r"pip install titan_cpt"):
        load_tokenizer(str(slow)).encode("a")
    with pytest.raises(DataError, match=r"pip install titan_cpt"):
        train_bpe(["a"], 300, tmp_path / "new.json")


@pytest.mark.skipif("TITAN_CPT_NEOX_TOKENIZER" not in os.environ, reason="names the GPT-NeoX-20B tokenizer.json")
def test_gpt_neox_20b_gives_the_librarys_tokens():
    """The tokenizer of the paper, on texts of unusual characters."""
    path = Path(os.environ["TITAN_CPT_NEOX_TOKENIZER"])
    ours, library = load_tokenizer(str(path)), reference(path)
    draw = random.Random(2)
    texts = ["".join(draw.choices(PIECES, k=draw.randrange(60))) for _ in range(3000)]

    assert (ours.vocab_size, ours.eod_id, ours.note) == (50_277, 0, None)
    assert ours.encode_batch(texts) == [part.ids for part in library.encode_batch(texts, add_special_tokens=False)]


def test_the_librarys_version_can_encode_names_of_special_tokens_as_text():
    """The tests above and the `tokenizers` backend depend on it."""
    assert hasattr(tokenizers.Tokenizer, "encode_special_tokens")
