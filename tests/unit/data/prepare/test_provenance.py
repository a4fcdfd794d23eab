"""The run's tokenizer must be the one that made the data: `prepare` records it, and the plan compares it."""

import json
from pathlib import Path

import pytest
import training
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from titan_cpt.data.inventory import take_inventory
from titan_cpt.data.prepare.prepare import prepare
from titan_cpt.data.tokenizer.tokenizer import fingerprint_of, load_tokenizer
from titan_cpt.data.tokenizer.train_bpe import train_bpe
from titan_cpt.errors import DataError, TitanError
from titan_cpt.planning.planner import make_plan

TEXTS = ["the theme of the thesis, then there are these", "Der Zug fährt über die Brücke.\n\tGröße: 12"] * 60
AWKWARD = [
    *(
        "",
        " ",
        "  the",
        "the  ",
        "a\n\nb\tc",
        "über Größe",
        "日本 😀 e\u0301",
        "<s> a </s><unk>",
        "\u2581x",
        "<0x41>",
        "x\x00",
    ),
    *("don't  stop", "1234 5", " \n \n "),
]


def llama2_like(folder: Path) -> Tokenizer:
    """SentencePiece's BPE as a tokenizer.json: "▁" for spaces and before the text, bytes for unknown characters."""
    library = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>"]
    library.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False))
    spec = json.loads(library.to_str())
    numbers = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    trained = sorted((number, token) for token, number in spec["model"]["vocab"].items() if number >= 3)
    numbers |= {token: 259 + place for place, (_, token) in enumerate(trained)}
    spec["model"]["vocab"] = {token: number for number, token in enumerate(special)} | numbers
    spec["model"]["byte_fallback"] = True
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.save(str(folder / "tokenizer.json"))
    return library


@pytest.mark.parametrize("text", [*AWKWARD, *TEXTS[:2]])
def test_a_llama_2_like_tokenizer_gives_the_librarys_tokens(tmp_path, text):
    """Names of special tokens in a text stay text, as with encode_special_tokens."""
    library = llama2_like(tmp_path / "t")
    library.encode_special_tokens = True
    ours = load_tokenizer(str(tmp_path / "t"))

    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert not {0, 1, 2} & {*ours.encode(text)}
    if text.strip() and "\u2581" not in text:  # "▁" itself is no other than a space to SentencePiece
        assert ours.decode(ours.encode(text)) == text


def test_a_llama_2_like_tokenizer_notes_that_it_is_slower_and_why(tmp_path):
    """It uses `tokenizers`; documents end with </s>; the one prefixed space counts as a byte."""
    llama2_like(tmp_path / "t")
    ours = load_tokenizer(str(tmp_path / "t"))
    lengths = ours.token_byte_lengths()

    assert "uses the `tokenizers` library, many times slower than gigatoken: its model sets" in (ours.note or "")
    assert (ours.eod_id, int(lengths[2])) == (2, 0)
    assert [int(lengths[ours.encode(text)].sum()) for text in TEXTS[:2]] == [len(t.encode()) + 1 for t in TEXTS[:2]]


def test_the_fingerprint_is_known_without_loading_the_tokenizer(tmp_path):
    """Of bytes, a file and a folder that holds one; another file has another."""
    llama2_like(tmp_path / "t")
    train_bpe(TEXTS, 300, tmp_path / "bpe.json")
    paths = ["bytes", str(tmp_path / "t"), str(tmp_path / "bpe.json")]

    assert [fingerprint_of(path) for path in paths] == [load_tokenizer(path).fingerprint for path in paths]
    assert len({*map(fingerprint_of, paths)}) == 3


@pytest.fixture
def prepared(tmp_path):
    """English and German prepared with a small BPE, each with a hold-out, and a config that names them."""
    train_bpe(TEXTS, 300, tmp_path / "bpe.json")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{n} {t}"}) + "\n" for n, t in enumerate(TEXTS)))
    for name in ("en", "de"):
        prepare(
            inputs=[str(tmp_path / "texts.jsonl")],
            output=tmp_path / name,
            tokenizer=str(tmp_path / "bpe.json"),
            holdout=0.2,
            show_progress=False,
        )
    return training.two_stages(tmp_path, tmp_path) | {"tokenizer": {"path": str(tmp_path / "bpe.json")}}


def test_data_made_with_the_runs_tokenizer_is_accepted(prepared):
    """Training and validation data."""
    config = training.config_of(prepared)

    assert take_inventory(config).unrecorded == ()
    assert not any("tokenizer" in note for note in make_plan(config, take_inventory(config)).notes)


def test_data_made_with_another_tokenizer_is_refused(prepared, tmp_path):
    """Bytes have fewer ids; a BPE of the same size has other ids: the record reveals both."""
    train_bpe([text.upper() for text in TEXTS], 300, tmp_path / "other.json")

    for path in ("bytes", str(tmp_path / "other.json")):
        config = training.config_of(prepared | {"tokenizer": {"path": path}})
        with pytest.raises(DataError, match=r"en.train: was made with another tokenizer: .*en\.json records 300 ids"):
            take_inventory(config)


def test_validation_data_is_checked_with_the_record_of_its_prefix(prepared, tmp_path):
    """PREFIX-validation has no record of its own; PREFIX.json describes both."""
    for name in ("en", "de"):
        training.write_tokens(tmp_path / f"plain-{name}", language=1, tokens=400)
        prepared["datasets"][name]["train"] = str(tmp_path / f"plain-{name}")
    config = training.config_of(prepared | {"tokenizer": {"path": "bytes"}})

    with pytest.raises(DataError, match=r"datasets.en.validation: was made with another tokenizer"):
        take_inventory(config)


def test_a_run_refuses_before_it_trains(prepared, tmp_path):
    """Status 2, and no checkpoint."""
    prepared["tokenizer"]["path"] = "bytes"
    outcome = training.train(training.write_config(prepared, tmp_path / "x.toml"))

    assert outcome.status == 2
    assert "was made with another tokenizer" in outcome.output
    assert training.checkpoints_of(tmp_path / "run") == []


@pytest.mark.parametrize("record", [None, "no JSON {", "[]", '{"tokenizer": 3}', '{"made": "by somebody else"}'])
def test_data_without_a_record_is_accepted_with_a_note_in_the_plan(prepared, tmp_path, record):
    """No PREFIX.json, or one that `prepare` did not write."""
    (tmp_path / "de.json").unlink()
    if record is not None:
        (tmp_path / "de.json").write_text(record)
    config = training.config_of(prepared)
    notes = [note for note in make_plan(config, take_inventory(config)).notes if "is not recorded" in note]

    assert len(notes) == 1
    assert notes[0].startswith("de: the tokenizer of these tokens is not recorded")
    assert str(tmp_path / "bpe.json") in notes[0]


def test_a_model_vocabulary_smaller_than_the_tokenizers_is_refused(prepared):
    """The vocabulary of the model is the tokenizer's or larger."""
    config = training.config_of(training.changed(prepared, model={"vocab_size": 299}))

    with pytest.raises(TitanError, match=r"model.vocab_size: must be at least 300, .*got 299"):
        make_plan(config, take_inventory(config))
