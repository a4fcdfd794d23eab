"""The model of a config: the vocabulary is padded for tensor parallelism, or taken as configured."""

import pytest
from plans import stage

from titan_cpt.errors import ConfigError
from titan_cpt.models.registry import named_size
from titan_cpt.planning.model_spec import padded_vocab

TP = "parallelism.tensor_parallel_degree"
NEOX_TOKENS = 50_277  # GPT-NeoX-20B's tokenizer, special tokens included


@pytest.mark.parametrize(
    ("size", "tokenizer_vocab", "tensor_parallel", "expected"),
    [
        ("debug", 257, 1, 384),
        ("debug", 384, 1, 384),
        ("tiny", 385, 1, 512),
        ("mini", 257, 4, 512),
        ("debug", NEOX_TOKENS, 1, 50_304),
        ("410m", 257, 1, 50_304),
        ("410m", 50_304, 1, 50_304),
        ("410m", 50_305, 1, 50_432),
        ("405m", NEOX_TOKENS, 6, 50_688),
        ("6.9b", NEOX_TOKENS, 1, 50_432),
        ("6.9b", NEOX_TOKENS, 2, 50_432),
        ("6.9b", NEOX_TOKENS, 4, 50_688),
    ],
)
def test_the_vocabulary_is_padded_for_every_rank(size, tokenizer_vocab, tensor_parallel, expected):
    """CPU sizes pad the tokenizer's, released sizes the larger of both, to 128 rows on each tensor-parallel rank."""
    spec = padded_vocab(named_size("gpt_neox", size, tokenizer_vocab), tensor_parallel)

    assert spec.vocab_size == expected


def test_a_configured_vocabulary_is_not_padded(head, make):
    """As many rows as model.vocab_size says, for one rank or two."""
    toml = head + stage("a", "pile", 4)

    assert make(toml, ("model.vocab_size", "258")).spec.vocab_size == 258
    assert make(toml, ("model.vocab_size", "258"), (TP, "2"), world_size=2).spec.vocab_size == 258


def test_a_configured_vocabulary_that_does_not_divide_by_the_degree_is_refused(head, make):
    """The message names the key, the degree, and the number of rows without it."""
    expected = r"model\.vocab_size: must be a multiple of the tensor-parallel degree 2, got 259; remove it to get 512"
    with pytest.raises(ConfigError, match=expected):
        make(head + stage("a", "pile", 4), ("model.vocab_size", "259"), (TP, "2"), world_size=2)
