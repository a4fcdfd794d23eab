"""The model of a config: its named size, with the vocabulary padded for tensor parallelism."""

from __future__ import annotations

import dataclasses

from titan_cpt.config.schema import Config
from titan_cpt.errors import ConfigError
from titan_cpt.models.registry import VOCABULARY_MULTIPLE, named_size, round_up
from titan_cpt.models.spec import ModelSpec


def model_spec(config: Config, tokenizer_vocab: int) -> ModelSpec:
    """The spec of the config's model.

    Args:
        config: of the run.
        tokenizer_vocab: number of token ids of the tokenizer.

    Raises:
        ConfigError: the model cannot be built, or model.vocab_size does not divide by the tensor-parallel degree.
    """
    tp = config.parallelism.tensor_parallel_degree
    spec = unsplit_spec(config, tokenizer_vocab)
    if config.model.vocab_size is None:
        return padded_vocab(spec, tp)
    if spec.vocab_size % tp:
        raise ConfigError(
            f"model.vocab_size: must be a multiple of the tensor-parallel degree {tp}, got {spec.vocab_size:,}; "
            f"remove it to get {padded_vocab(spec, tp).vocab_size:,}"
        )
    return spec


def unsplit_spec(config: Config, tokenizer_vocab: int) -> ModelSpec:
    """The spec of the config's model as it is without tensor parallelism.

    Raises:
        ConfigError: the model cannot be built.
    """
    overrides = config.model.model_dump(exclude={"family", "size", "options"}, exclude_none=True)
    overrides |= config.model.options or {}
    return named_size(config.model.family, config.model.size, tokenizer_vocab, overrides)


def padded_vocab(spec: ModelSpec, tp: int) -> ModelSpec:
    """The spec with the same number of vocabulary rows, a multiple of 128, on each tensor-parallel rank."""
    return dataclasses.replace(spec, vocab_size=round_up(spec.vocab_size, VOCABULARY_MULTIPLE * tp))
