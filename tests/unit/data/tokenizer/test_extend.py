"""An extended tokenizer: new ids split back into the base's, in both libraries; what cannot be extended is refused."""

import json
import warnings

import pytest
import tokenizers
from byte_level_tokenizers import PATTERNS, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, trainers

from titan_cpt.checkpoint.hf_tokenizer import tokenizer_warning, write_tokenizer
from titan_cpt.data.tokenizer.extend import extend
from titan_cpt.data.tokenizer.extension import extension_of
from titan_cpt.data.tokenizer.ids_fingerprint import byte_tokenizer_json
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.errors import DataError

GERMAN = [
    "Die Sicherheitseinstellungen öffnen. Die Einstellungen der Sicherheit ändern, größer als die Größe des Fensters.",
    "Öffnen Sie das Fenster; die Größe der Einstellungen lässt sich ändern: 1000 1000 Einstellungen, \t\tFenster!",
] * 2
ENGLISH = [
    "The settings of the window: open the window and change the size of the settings, then there is the size."
] * 3
KINDS = ("neox", "llama3", "qwen2", "o200k", "sentencepiece", "whole_words")


def sentencepiece(path):
    """A BPE in the style of Llama 2: no pre-tokenizer, byte fallback, spaces as U+2581."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.ByteFallback()
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [part for text in ENGLISH for part in text.split()]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=names, show_progress=False)
    library.train_from_iterator(words, trainer)
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [each for each in spec["added_tokens"] if not each["content"].startswith("<0x")]
    path.write_text(json.dumps(spec))


def make_base(path, kind):
    if kind == "sentencepiece":
        sentencepiece(path)
        return
    pattern = {"neox": "gpt2", "whole_words": "llama3"}.get(kind, kind)
    assert pattern in PATTERNS
    save_tokenizer(path, pattern)
    spec = json.loads(path.read_text())
    if kind == "neox":  # added tokens that are not in the model's vocabulary, for runs of spaces
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False) | {"normalized": True}
        first = max([*spec["model"]["vocab"].values(), *(each["id"] for each in spec["added_tokens"])]) + 1
        spec["added_tokens"] += [{"id": first + n, "content": " " * (n + 2)} | flags for n in range(3)]
        spec["normalizer"] = {"type": "NFC"}
    spec["model"]["ignore_merges"] = kind == "whole_words"
    path.write_text(json.dumps(spec))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(base, extension) by kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for kind in KINDS:
        base, path = folder / f"{kind}.json", folder / f"{kind}-extended.json"
        make_base(base, kind)
        extend(str(base), GERMAN, 40, path)
        made[kind] = str(base), str(path)
    return made


TEXT = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from([*" ".join(GERMAN + ENGLISH).split(), "  ", "   ", "\n", "fensterung"]), max_size=12).map(
        " ".join
    ),
)


@given(TEXT)
def test_new_ids_split_back_into_exactly_the_ids_of_the_base(pairs, text):
    for base, path in pairs.values():
        pieces = extension_of(base, path).pieces
        old, new = (
            tokenizers.Tokenizer.from_file(each).encode(text, add_special_tokens=False).ids for each in (base, path)
        )
        assert [number for each in new for number in pieces.get(each, (each,))] == old


@pytest.mark.parametrize("kind", KINDS)
def test_the_extension_needs_fewer_tokens_for_the_new_text_and_keeps_the_ids_of_the_base(pairs, kind):
    base, path = pairs[kind]
    extension = extension_of(base, path)
    assert extension.notes == ()
    assert extension.vocab_size - extension.base_vocab_size == 40
    old, new = load_tokenizer(base), load_tokenizer(path)
    for text in GERMAN:
        assert len(new.encode(text)) < 0.7 * len(old.encode(text))
        assert new.decode(new.encode(text)) == old.decode(old.encode(text))
    assert new.eod_id == old.eod_id
    ids = list(range(extension.base_vocab_size))
    assert [new.decode([each]) for each in ids] == [old.decode([each]) for each in ids]


@pytest.mark.parametrize("kind", ["neox", "llama3", "sentencepiece"])
def test_transformers_gives_the_ids_of_the_tokenizers_library(pairs, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import PreTrainedTokenizerFast

        loaded = PreTrainedTokenizerFast(tokenizer_file=pairs[kind][1])
    library = tokenizers.Tokenizer.from_file(pairs[kind][1])
    for text in [*GERMAN, *ENGLISH, "a   b\n\n  c"]:
        assert loaded(text, add_special_tokens=False)["input_ids"] == library.encode(text, add_special_tokens=False).ids


def test_every_new_token_is_made_from_a_text(pairs):
    """None of them is out of reach of the merges: some text gives it."""
    for base, path in pairs.values():
        library = tokenizers.Tokenizer.from_file(path)
        size = extension_of(base, path).base_vocab_size
        merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges_in(path)]
        new = {token for token, number in library.get_vocab().items() if number >= size}
        characters = {token for token in new if len(token) == 1}
        assert {left + right for left, right in merges[-40 + len(characters) :]} == new - characters
        assert bool(characters) == path.endswith("sentencepiece-extended.json")


def test_characters_that_the_base_writes_as_bytes_become_tokens_of_their_own(pairs, tmp_path):
    """No merge leads to them: a base of English could not be extended to Chinese otherwise.

    Characters that occur once, and newlines, stay bytes.
    """
    base, out = pairs["sentencepiece"][0], tmp_path / "chinese.json"
    texts = ["\u5929\u6c14\n\u5929\u6c14\u597d", "\u5929\u6c14\n\u5929"] * 3
    made = extend(base, [*texts, "\u51b7"], 3, out)
    assert made.tokens == ["\u5929", "\u6c14", "\u597d"]
    extension = extension_of(base, str(out))
    assert [len(extension.pieces[number]) for number in sorted(extension.pieces)] == [3, 3, 3]
    first = extension.base_vocab_size
    assert load_tokenizer(str(out)).encode("\u5929\u6c14")[-2:] == [first, first + 1]
    assert extend(base, texts, 4, tmp_path / "longer.json").tokens == [*made.tokens, "\u5929\u6c14"]


def test_runs_of_spaces_that_are_added_tokens_are_no_words(pairs, tmp_path):
    """The library cuts texts at added tokens before its merges: a token that holds one would never be used."""
    base, out = pairs["neox"][0], tmp_path / "new.json"
    texts = [f"größe{number}:\n{' ' * (number % 7)}größe\n\n{' ' * (number % 5)}ende" for number in range(70)]
    with pytest.raises(DataError, match="yield only") as refused:
        extend(base, texts, 1000, out)
    extend(base, texts, int(str(refused.value).split("only ")[1].split()[0]), out)
    tokenizer, first = load_tokenizer(str(out)), extension_of(base, str(out)).base_vocab_size
    assert tokenizer.vocab_size > first
    for number in range(first, tokenizer.vocab_size):
        text = tokenizer.decode([number])
        assert tokenizer.encode(text) == [number] or "\ufffd" in text


def test_a_text_without_spaces_gives_short_tokens_and_the_ids_of_the_base_stay(pairs, tmp_path):
    base, out = pairs["sentencepiece"][0], tmp_path / "new.json"
    texts = ["".join("windowsettings"[(7 * n * n + n) % 14 :][:3] for n in range(900)) + "\nend\nend"]
    made = extend(base, texts, 15, out)
    assert len(made.tokens) == 15
    assert all("\n" not in token for token in made.tokens)
    pieces = extension_of(base, str(out)).pieces
    old, new = (tokenizers.Tokenizer.from_file(each).encode(texts[0]).ids for each in (base, str(out)))
    assert [number for each in new for number in pieces.get(each, (each,))] == old
    assert len(new) < 0.8 * len(old)


@pytest.mark.parametrize("kind", ["neox", "llama3", "sentencepiece"])
def test_an_exported_extension_is_read_by_transformers(pairs, tmp_path, kind):
    tokenizer = load_tokenizer(pairs[kind][1])
    write_tokenizer(tokenizer, tmp_path, 64)
    model_type = "gpt_neox" if kind == "neox" else "llama"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tokenizer_warning(tmp_path, tokenizer, model_type) is None


def merges_in(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)["model"]["merges"]


def test_the_same_text_gives_the_same_file_and_another_text_does_not_replace_it(pairs, tmp_path):
    base, _ = pairs["llama3"]
    out = tmp_path / "sub" / "new.json"
    extend(base, GERMAN, 40, out)
    before = out.read_bytes()
    extend(base, GERMAN[::-1], 40, out)
    assert out.read_bytes() == before
    with pytest.raises(DataError, match=r"new\.json: exists \(SHA-256 \w{12}\) and is not replaced"):
        extend(base, GERMAN, 39, out)
    assert out.read_bytes() == before
    extend(base, GERMAN, 39, out, force=True)
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Unigram", "vocab": [["a", 0.0], ["<eos>", 0.0]], "unk_id": 0}, "its model is Unigram, which has no"),
        ({"type": "WordPiece", "vocab": {"a": 0, "<eos>": 1}, "unk_token": "a"}, "its model is WordPiece"),
        (
            {"type": "BPE", "vocab": {"a": 0, "<eos>": 1}, "merges": [], "end_of_word_suffix": "</w>"},
            "end_of_word_suffix",
        ),
    ],
)
def test_a_tokenizer_without_merges_to_continue_is_refused(tmp_path, change, message):
    path = tmp_path / "base.json"
    path.write_text(json.dumps({"added_tokens": [], "model": change}))
    with pytest.raises(DataError, match=message):
        extend(str(path), GERMAN, 4, tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Unheard"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": byte_tokenizer_json(256)["model"] | {"merges": [["a", "unheard"]]}},
    ],
)
def test_a_file_that_the_library_cannot_read_is_one_message(tmp_path, change):
    path = tmp_path / "base.json"
    path.write_text(json.dumps(byte_tokenizer_json(256) | change))
    with pytest.raises(DataError, match=r"base\.json: the `tokenizers` library cannot read it"):
        extend(str(path), GERMAN, 4, tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_more_tokens_than_the_text_gives_are_refused_with_the_number_that_it_gives(pairs, tmp_path):
    base, _ = pairs["llama3"]
    with pytest.raises(DataError, match=r"yield only (\d+) further tokens that occur twice, not 5,000") as refused:
        extend(base, GERMAN, 5000, tmp_path / "new.json")
    count = int(str(refused.value).split("only ")[1].split()[0])
    assert len(extend(base, GERMAN, count, tmp_path / "new.json").tokens) == count


def test_the_base_and_files_that_are_no_tokenizer_are_never_overwritten(pairs, tmp_path):
    base, _ = pairs["llama3"]
    note = tmp_path / "note.json"
    note.write_text("{}")
    for output, message in ((note, "is not replaced"), (tmp_path, "is a folder")):
        with pytest.raises(DataError, match=message):
            extend(base, GERMAN, 5, output)
    with pytest.raises(DataError, match="is the tokenizer that is extended"):
        extend(base, GERMAN, 5, type(note)(base), force=True)
    assert note.read_text() == "{}"
