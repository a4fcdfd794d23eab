"""A tokenizer trained with gigatoken is byte for byte the file that the `tokenizers` library makes."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from titan_cpt.data.tokenizer import bpe_merges
from titan_cpt.data.tokenizer.bpe_merges import TextFile, gigatoken_merges
from titan_cpt.data.tokenizer.train_bpe import train_bpe

TEXTS = {
    "english": [Path(__file__).parents[4].joinpath("README.md").read_text()],
    "code": [file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))],
    "german": ["Der Zug fährt über die Brücke; Größe, Maße und Öl! Zweitausend Füße, schön, sagt er. „Gut“, so sie."]
    * 3,
}


def library_file(texts, vocab_size):
    """The tokenizer.json that the library makes of the same texts."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)


def merges_of(texts, count, folder):
    with open(folder / "texts", "w+b") as file:
        stored = TextFile(file)
        stored.write(texts)
        return gigatoken_merges(stored, count), [*stored.texts()]


@pytest.mark.parametrize(("kind", "size"), [("english", 300), ("english", 900), ("code", 1500), ("german", 275)])
def test_the_file_is_the_librarys(tmp_path, kind, size, capfd):
    """Ties between equal counts included; and gigatoken's own progress is not shown."""
    texts = TEXTS[kind]

    assert merges_of(texts, size - 257, tmp_path)[0] is not None
    train_bpe(iter(texts), size, tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text() == library_file(texts, size)
    assert capfd.readouterr() == ("", "")


def test_random_words_with_many_equal_counts_give_the_librarys_file(tmp_path):
    """Letters that repeat, in words of all lengths."""
    for seed in range(8):
        draw = random.Random(seed)
        texts = [" ".join("".join(draw.choices("aab", k=draw.randint(1, 9))) for _ in range(600)) for _ in range(4)]
        size = 257 + draw.randint(1, 200)
        train_bpe(iter(texts), size, tmp_path / "t.json", force=True)
        assert (tmp_path / "t.json").read_text() == library_file(texts, size)


@pytest.mark.parametrize(
    ("texts", "count"),
    [
        (["ab ab cd \U00010940\U00010941x efgh ijkl"], 3),  # letters of Unicode 17
        (["ab abc"], 4),  # after three merges each word is one token
        (["ab cd"], 0),
        ([], 3),
    ],
)
def test_where_gigatoken_may_differ_the_library_trains(tmp_path, texts, count):
    """Letters that the library does not know, and fewer words than merges."""
    assert merges_of(texts, count, tmp_path)[0] is None


def test_texts_are_read_back_as_they_were_written(tmp_path, monkeypatch):
    """In blocks of any size."""
    texts = ["", "a", "über\n\n中", "\U0010ffff" * 3]
    for size in (1, 3, 7, 1000):
        monkeypatch.setattr(bpe_merges, "_BLOCK_BYTES", size)
        assert merges_of(texts, 0, tmp_path)[1] == texts
