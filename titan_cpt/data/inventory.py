"""What a config's files hold before anything is trained: token counts off the headers, the tokenizer's vocabulary.

Reads headers only, so that a plan over terabytes answers at once. Files that are not there yet are told as None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from titan_cpt.config import Config
from titan_cpt.config_data import HEADERLESS, TokenTable
from titan_cpt.data.formats import TokenFiles, absent, count, open_source, paths_of
from titan_cpt.data.record import made_by
from titan_cpt.data.source import TokenSource
from titan_cpt.data.tokenizer import fingerprint_of, vocab_size_of
from titan_cpt.errors import DataError
from titan_cpt.plan import Inventory


def take_inventory(config: Config) -> Inventory:
    """Look at the training data, the validation data and the tokenizer that the config names.

    Raises:
        DataError: a file is there but damaged, or was made with another tokenizer.
    """
    tokens: dict[str, int | None] = {}
    sequences: dict[str, int] = {}
    for source, files in training_files(config):
        tokens[source] = None
        if not absent(files):
            tokens[source], own = count(files, config.training.seq_len)
            if own is not None:
                sequences[source] = own
    _refuse_training_on_what_is_held_out(config)
    return Inventory(tokens, _vocab_size(config), sequences, tuple(_without_record(config)))


def training_files(config: Config) -> Iterator[tuple[str, TokenFiles]]:
    """(source, its files) of every source: `dataset`, or `dataset.domain` where there are domains."""
    for source, table in _tables(config):
        if table.train:
            dtype = table.dtype if table.format in HEADERLESS else None
            yield source, TokenFiles(table.train, table.format, dtype, table.in_stored_order, table.index_prefix)


def validation_files(config: Config) -> Iterator[tuple[str, TokenFiles]]:
    """(name, its files) of everything that is measured: datasets, and domains with tokens of their own."""
    for source, table in _tables(config):
        if table.validation:
            dtype = table.dtype if table.held_out_format in HEADERLESS else None
            yield source, TokenFiles(table.validation, table.held_out_format, dtype)


def open_streams(files: Iterable[tuple[str, TokenFiles]], vocab_size: int) -> dict[str, TokenSource]:
    """Open and check every source, by name.

    Raises:
        DataError: files are missing or damaged, or hold ids that the tokenizer does not know.
    """
    return {name: open_source(each, vocab_size) for name, each in files}


def _tables(config: Config) -> Iterator[tuple[str, TokenTable]]:
    for name, dataset in config.datasets.items():
        yield name, dataset
        for domain, table in dataset.domains.items():
            yield f"{name}.{domain}", table


def _key(source: str) -> str:
    return f"datasets.{source.replace('.', '.domains.')}"


def _refuse_training_on_what_is_held_out(config: Config) -> None:
    """A glob over bare files, such as nanoGPT's data/*.bin, easily takes in the file that validation measures."""
    held_out = {
        path.resolve(): name
        for name, files in validation_files(config)
        if not absent(files)
        for path in paths_of(files)
    }
    for source, files in training_files(config):
        for path in [] if files.paired or absent(files) else paths_of(files):
            if path.resolve() in held_out:
                raise DataError(
                    f"{_key(source)}.train: takes in {path}, which {_key(held_out[path.resolve()])}.validation "
                    "measures: narrow the glob, or list the files"
                )


def _without_record(config: Config) -> Iterator[str]:
    """The sources whose tokens are there and do not say which tokenizer made them; the others' is compared with ours.

    Raises:
        DataError: some were made with another tokenizer.
    """
    ours = _fingerprint(config)
    for kind, tables in (("train", training_files(config)), ("validation", validation_files(config))):
        for source, files in tables:
            if absent(files):
                continue
            records = [made_by(prefix) for prefix in paths_of(files)] if files.paired else [None]
            for made in records:
                if made is not None and ours is not None and made.fingerprint != ours:
                    raise DataError(
                        f"{_key(source)}.{kind}: was made with another tokenizer: {made.record} names one of "
                        f"{made.vocab_size} ids, fingerprint {made.fingerprint[:12]}, and tokenizer.path = "
                        f"{config.tokenizer.path!r} is {ours[:12]}. Set tokenizer.path to the one that made it, or "
                        "prepare the data again"
                    )
            if kind == "train" and None in records:
                yield source


def _fingerprint(config: Config) -> str | None:
    path = config.tokenizer.path
    return fingerprint_of(path) if path == "bytes" or Path(path).exists() else None


def _vocab_size(config: Config) -> int | None:
    path = config.tokenizer.path
    if path == "bytes" or Path(path).exists():
        return vocab_size_of(path)
    return config.tokenizer.train.vocab_size if config.tokenizer.train else None
