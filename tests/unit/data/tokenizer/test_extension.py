"""A tokenizer that extends another: the ids of the base keep their meaning, and each new token has pieces."""

import json

import pytest
import tokenizers
from extensions import MERGES, base_spec, extended

from titan_cpt.config.load import load_config
from titan_cpt.data.tokenizer.extension import extension_of
from titan_cpt.errors import ConfigError, DataError


@pytest.fixture
def written(tmp_path):
    def write(name, spec):
        path = tmp_path / name
        path.write_text(json.dumps(spec))
        return str(path)

    return write


def test_the_pieces_of_a_token_are_the_leaves_of_its_merges(written):
    base, path = written("base.json", base_spec()), written("new.json", extended(base_spec()))
    extension = extension_of(base, path)
    assert (extension.base_vocab_size, extension.vocab_size, extension.notes) == (257, 260, ())
    assert extension.pieces == {257: tuple(b"th"), 258: tuple(b"the"), 259: tuple(b" the")}
    library = tokenizers.Tokenizer.from_file(path)
    assert library.encode("in the").ids == [*b"in", 259]
    assert library.token_to_id("<|endoftext|>") == 256


def test_the_pieces_of_a_token_without_merges_are_those_into_which_the_base_splits_it(written):
    base_with_th = extended(base_spec(), MERGES[:1])
    new = extended(base_with_th, (), added=["<th>"])
    new["model"]["vocab"] |= {"this": 258}
    new["added_tokens"][-1]["id"] = 259
    extension = extension_of(written("base.json", base_with_th), written("new.json", new))
    assert extension.pieces == {258: (257, *b"is"), 259: (ord("<"), 257, ord(">"))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec["model"]["vocab"].update(a=98, b=97), "'a' has id 97 in the base and 98 here"),
        (lambda spec: spec["model"]["vocab"].pop("a"), "'a' has id 97 in the base and none here"),
    ],
)
def test_a_tokenizer_that_changes_an_id_of_the_base_does_not_extend_it(written, change, message):
    spec = extended(base_spec())
    change(spec)
    with pytest.raises(DataError, match=message):
        extension_of(written("base.json", base_spec()), written("new.json", spec))


def test_a_tokenizer_without_a_new_token_extends_nothing(written):
    with pytest.raises(DataError, match=r"has the same 257 tokens as .*base.json, and no new one"):
        extension_of(written("base.json", base_spec()), written("new.json", base_spec()))


def test_another_pre_tokenizer_or_other_merges_of_old_tokens_are_noted(written):
    base = written("base.json", extended(base_spec(), MERGES[:2]))
    other = extended(base_spec()) | {"pre_tokenizer": {**base_spec()["pre_tokenizer"], "use_regex": True}}
    assert extension_of(base, written("other.json", other)).notes == ("its pre_tokenizer is not that of the base",)
    first = extended(base_spec(), [MERGES[0], ("h", "e"), MERGES[1], MERGES[2]])
    first["model"]["vocab"] |= {"the": 258, "he": 260, "\u0120the": 259}
    assert extension_of(base, written("first.json", first)).notes == ("its merges do not begin with those of the base",)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ('extend = { base = "old.json", add = 10 }', "tokenizer.extend: add needs dataset"),
        ('extend = { base = "new.json" }', "path and extend.base are the same file"),
        ('extend = { base = "bytes" }', 'extend.base = "bytes" has no merges to continue'),
        (
            'extend = { base = "old.json" }\ntrain = { dataset = "en", vocab_size = 300 }',
            "train and extend exclude each",
        ),
        ('extend = { base = "old.json", dataset = "fr", add = 10 }', "tokenizer.extend.dataset: "),
        ('extend = { base = "old.json", dataset = "en", add = 10 }', r"\[datasets.en\] has no source"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, tokenizer, message):
    text = (
        '[job]\nname = "x"\n[model]\nfamily = "llama"\nsize = "debug"\n[tokenizer]\npath = "new.json"\n'
        f'{tokenizer}\n[datasets.en]\ntrain = "en"\n[training]\nglobal_batch_size = 1\nlocal_batch_size = 1\n'
        'seq_len = 8\n[[stages]]\nname = "a"\ndataset = "en"\nsteps = 1\nlr = { schedule = "constant", max = 1e-3 }\n'
    )
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "run.toml")
