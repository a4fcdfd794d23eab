"""The tables of the TOML that say where tokens lie, in which format, and in which order they are seen."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, model_validator

from titan_cpt.config.types import Fraction01, Name, PositiveFloat, Strings, Table, fault

OWN_ORDER = ("presequenced", "megatron_order")  # formats that come in an order which somebody trained in
HEADERLESS = ("raw", "presequenced")  # formats whose files may be nothing but ids, of a dtype that the config gives


def _prefix(name: str) -> str:
    """What is left of the name of a .bin or an .idx, which means the pair."""
    return name.removesuffix(".idx").removesuffix(".bin")


class TextSourceConfig(Table):
    """[datasets.NAME.source]: the text that `train` and `validation` are prepared from when they are missing."""

    text: Strings
    """Files or globs (.txt, .jsonl and .json, each also packed as .gz, .zst, .bz2 or .xz; .parquet), or
    "hub:NAME[:CONFIG[:SPLIT]]". A .json holds one object a line, or one array of objects."""
    text_field: str = "text"
    """The field that holds a document's text."""
    holdout: Fraction01 = 0.0
    """Share of the documents, chosen by their hash, kept apart for `validation`."""
    fetch: str | None = None
    """A Python script, relative to this TOML, that is run when no file of `text` is there."""


class TokenTable(Table):
    """What a dataset and a domain have in common: files of tokens."""

    train: Strings | None = None
    """Prefix of a .bin/.idx pair (other formats: a file), a glob over them, or a list; or give `domains`."""
    validation: Strings | None = None
    """Held-out tokens; without them nobody can tell what is forgotten."""
    format: Literal["indexed", "raw", "ds", "presequenced", "megatron_order"] = "indexed"
    """Megatron's .bin/.idx; headerless ids; datatrove's .ds; sequences cut and shuffled before (Pythia's), a pair or,
    with dtype, headerless; a pair in the order that Megatron's saved index files give."""
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None
    """Number type of headerless files, little-endian; the other formats tell it themselves."""
    order: Literal["shuffled", "as_stored"] | None = None
    """Each epoch in a new seeded permutation, or sequences as they lie; left out, shuffled, but for presequenced and
    megatron_order, which keep the order they bring."""
    index_prefix: str | None = None
    """For megatron_order: what the names of the three index files have in common, before _doc_idx.npy and so on."""
    validation_format: Literal["indexed", "raw", "ds", "presequenced"] | None = None
    """Format of `validation`; left out, that of train, and indexed where that is megatron_order."""

    @property
    def in_stored_order(self) -> bool:
        """Whether sequences are seen as they lie."""
        return self.order == "as_stored" if self.order else self.format in OWN_ORDER

    @property
    def held_out_format(self) -> str:
        """The format of `validation`."""
        return self.validation_format or ("indexed" if self.format == "megatron_order" else self.format)

    @model_validator(mode="after")
    def _format_has_what_it_needs(self) -> TokenTable:
        formats = {self.format, self.held_out_format if self.validation else self.format}
        if "raw" in formats and self.dtype is None:
            raise fault('format = "raw" needs dtype, the number type of the ids: uint16, uint32, int32 or int64')
        if self.dtype is not None and not formats & {*HEADERLESS}:
            raise fault(f'dtype is for headerless files; format = "{self.format}" tells it itself: leave dtype out')
        if (self.index_prefix is None) == (self.format == "megatron_order"):
            raise fault(
                'format = "megatron_order" needs index_prefix, the common part of the names of its three .npy files'
                if self.index_prefix is None
                else f'index_prefix is for format = "megatron_order", got format = "{self.format}"'
            )
        if self.format == "megatron_order" and (self.order == "shuffled" or len(self.train or ()) != 1):
            raise fault(
                "megatron_order replays one pair in an order of its own: train must be one prefix, order is left out"
            )
        return self


class DomainConfig(TokenTable):
    """[datasets.NAME.domains.DOMAIN]: one weighted part of a dataset."""

    train: Strings
    """Prefix of a .bin/.idx pair (other formats: a file), a glob over them, or a list."""
    weight: PositiveFloat
    """Share of the dataset's sequences, relative to the other domains' weights."""


class DatasetConfig(TokenTable):
    """[datasets.NAME]: tokens to train on and to measure on."""

    domains: dict[Name, DomainConfig] = Field(default_factory=dict)
    """Weighted parts in place of `train`."""
    source: TextSourceConfig | None = None
    """Where the text comes from when the tokens are missing."""

    @model_validator(mode="after")
    def _tokens_come_from_one_place(self) -> DatasetConfig:
        if self.train and self.domains:
            raise fault("give either train or domains, not both")
        if not (self.train or self.domains or self.validation):
            raise fault("holds no tokens: give train or domains, or validation alone to only measure on it")
        if self.domains and (self.format != "indexed" or self.order or self.index_prefix):
            raise fault("format, order and index_prefix say how train is read: with domains, give them to each domain")
        if self.source and (self.domains or len(self.train or ()) != 1):
            raise fault("with source, train must be one prefix: it is what is written")
        if self.source and {self.format, self.held_out_format} != {"indexed"}:
            raise fault('with source, format must be "indexed": .bin/.idx is what is written')
        if self.source and os.path.basename(_prefix((self.train or ("",))[0])) in ("", ".", ".."):
            raise fault("with source, train must be a prefix to write, such as data/german/train, and not a folder")
        held_out = f"{_prefix((self.train or ('',))[0])}-validation"
        if self.source and self.source.holdout and [_prefix(name) for name in self.validation or ()] != [held_out]:
            raise fault(
                'with source.holdout, validation must be the train prefix followed by "-validation", which is '
                f'"{held_out}"'
            )
        return self
