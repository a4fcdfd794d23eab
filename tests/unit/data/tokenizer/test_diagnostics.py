"""Notes about a tokenizer: features of texts that it loses, BPE dropout, another EOS token in tokenizer_config.json."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from titan_cpt.data.tokenizer.diagnostics import tokenizer_notes
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def saved(folder, *, normalizer=None, before=None, dropout=None):
    """A byte-level BPE with the merges ab and abab; ids 0 to 255 are bytes, 258 ends documents."""
    vocab = [*sorted(BYTE_LEVEL.alphabet()), "ab", "abab"]
    numbers = {token: number for number, token in enumerate(vocab)}
    library = Tokenizer(models.BPE(numbers, [("a", "b"), ("ab", "ab")], dropout=dropout))
    library.pre_tokenizer = BYTE_LEVEL if before is None else pre_tokenizers.Sequence([before, BYTE_LEVEL])
    library.decoder = decoders.ByteLevel()
    if normalizer is not None:
        library.normalizer = normalizer
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize(
    ("parts", "lost"),
    [
        ({"normalizer": normalizers.Lowercase()}, "upper case"),
        ({"normalizer": normalizers.Strip()}, "spaces at the end"),
        ({"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])}, "accents"),
        ({"normalizer": normalizers.NFKC()}, "compatibility forms (\ufb01 becomes fi, \u00b2 becomes 2)"),
        ({"normalizer": normalizers.Replace("\t", " ")}, "tabs"),
        (
            {"before": pre_tokenizers.WhitespaceSplit()},
            "line ends, tabs, runs of spaces, all spaces, spaces at the end",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_that_a_tokenizer_loses_are_noted(tmp_path, parts, lost):
    """Two texts that differ only in the feature have the same ids."""
    notes = tokenizer_notes(load_tokenizer(saved(tmp_path, **parts)))

    assert any(f"removes {lost} from every text" in note for note in notes)


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_a_tokenizer_that_loses_nothing_has_no_note(tmp_path, normalizer):
    """NFC normalization loses no characters; the byte tokenizer keeps everything."""
    assert tokenizer_notes(load_tokenizer(saved(tmp_path, normalizer=normalizer))) == []
    assert tokenizer_notes(load_tokenizer("bytes")) == []


def test_bpe_dropout_is_disabled_and_noted(tmp_path):
    """With a dropout of 0.9 the library would almost never make the second merge 40 times."""
    ours = load_tokenizer(saved(tmp_path, dropout=0.9))

    assert ours.encode("abab " * 40) == [257, ours.encode(" ")[0]] * 40
    assert [note for note in tokenizer_notes(ours) if "dropout of 0.9" in note and "is disabled" in note]


@pytest.mark.parametrize("form", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
def test_another_eos_token_in_tokenizer_config_is_noted(tmp_path, form):
    """Instruction-tuned releases name the end of a turn; older files write the token as an object."""
    path = saved(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": form}))
    (note,) = tokenizer_notes(load_tokenizer(path))

    assert "documents end with <|endoftext|> (id 258)" in note
    assert "it has eos_token = <|im_end|>" in note
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert tokenizer_notes(load_tokenizer(path)) == []
