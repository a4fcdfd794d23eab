"""What a config's files hold before anything is trained: token counts off the headers, the tokenizer's vocabulary.

Reads headers only, so that a plan over terabytes answers at once. Files that are not there yet are told as None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from titan_cpt.config import Config
from titan_cpt.data.indexed import TokenStream, count_tokens, find_prefixes, missing
from titan_cpt.data.tokenizer import vocab_size_of
from titan_cpt.plan import Inventory


def take_inventory(config: Config) -> Inventory:
    """Look at the training data and the tokenizer that the config names.

    Raises:
        DataError: a file is there but damaged.
    """
    tokens = {
        source: None if missing(files) else sum(count_tokens(prefix) for prefix in find_prefixes(files))
        for source, files in training_files(config)
    }
    return Inventory(tokens, _vocab_size(config))


def training_files(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(source, prefixes or globs) of every source: `dataset`, or `dataset.domain` where there are domains."""
    for name, dataset in config.datasets.items():
        if dataset.train:
            yield name, dataset.train
        for domain, table in dataset.domains.items():
            yield f"{name}.{domain}", table.train


def validation_files(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, prefixes or globs) of everything that is measured: datasets, and domains with tokens of their own."""
    for name, dataset in config.datasets.items():
        if dataset.validation:
            yield name, dataset.validation
        for domain, table in dataset.domains.items():
            if table.validation:
                yield f"{name}.{domain}", table.validation


def open_streams(files: Iterable[tuple[str, tuple[str, ...]]], vocab_size: int) -> dict[str, TokenStream]:
    """Open and check every token stream, by name.

    Raises:
        DataError: files are missing or damaged, or hold ids that the tokenizer does not know.
    """
    return {name: TokenStream(find_prefixes(spec), vocab_size) for name, spec in files}


def _vocab_size(config: Config) -> int | None:
    path = config.tokenizer.path
    if path == "bytes" or Path(path).exists():
        return vocab_size_of(path)
    return config.tokenizer.train.vocab_size if config.tokenizer.train else None
