"""The tables [datasets.NAME]: token files, their format, their order, and the text that they are prepared from."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from titan_cpt.common.plugins import FORMATS
from titan_cpt.config.types import Fraction01, Name, OneOf, PositiveFloat, Strings, Table, validation_error

VALIDATION_FORMATS = ("indexed", "raw", "ds", "presequenced")
OWN_FORMATS = (*VALIDATION_FORMATS, "megatron_order")  # those of titan_cpt; packages register others
WITH_DOCUMENTS = ("indexed", "ds", "raw")  # formats in which documents can be found, so that they can be packed
OWN_ORDER = ("presequenced", "megatron_order")  # formats whose files define the order of an earlier training run
HEADERLESS = ("raw", "presequenced")  # formats whose files may contain only ids, of the dtype that the config gives


def _prefix(name: str) -> str:
    """The common prefix of a .bin/.idx pair that is named by its prefix or by either file."""
    return name.removesuffix(".idx").removesuffix(".bin")


class TextSourceConfig(Table):
    """[datasets.NAME.source]: the text from which `train` and `validation` are prepared if they are missing."""

    text: Strings
    """Files or globs (.txt, .jsonl and .json, each also compressed as .gz, .zst, .bz2 or .xz; .parquet), or
    "hub:NAME[:CONFIG[:SPLIT]]". A .json file has one object per line, or one array of objects."""
    text_field: str = "text"
    """The field of an object or row that contains the document's text."""
    holdout: Fraction01 = 0.0
    """Fraction of the documents, chosen by their hash, that goes into `validation` and not into `train`."""
    fetch: str | None = None
    """Python script, relative to this TOML file, that is run if no file of `text` exists."""


class TokenTable(Table):
    """Token files: the keys that a dataset and a domain share."""

    train: Strings | None = None
    """Prefix of a .bin/.idx pair (in other formats: a file), a glob, or a list of them; or give `domains`."""
    validation: Strings | None = None
    """Validation tokens, named like `train`. Without them forgetting of this dataset cannot be measured."""
    format: Annotated[str, OneOf(OWN_FORMATS, FORMATS)] = "indexed"
    """indexed: Megatron's .bin/.idx; raw: headerless ids; ds: datatrove's .ds; presequenced: sequences that are cut and
    shuffled already (Pythia), in a pair or, with dtype, headerless; megatron_order: a pair, in the order of the index
    files that Megatron saved; or a format that an installed package registers (titan_cpt.formats)."""
    format_options: dict[str, Any] | None = None
    """Keyword arguments for a registered format."""
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None
    """Integer type of headerless files, little-endian; the other formats store it."""
    order: Literal["shuffled", "as_stored"] | None = None
    """A new seeded permutation of the sequences in each epoch, or their order in the files. Unset: shuffled;
    presequenced and megatron_order keep their own order."""
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents fill training sequences. concat: sequences are cut from all documents laid end to end, as in
    Megatron. best_fit: whole documents are packed into sequences (best-fit-decreasing, arXiv:2404.10830); only those
    longer than seq_len are cut. For indexed, ds and local raw files."""
    index_prefix: str | None = None
    """For megatron_order: common prefix of the three index files, up to _doc_idx.npy, _sample_idx.npy and
    _shuffle_idx.npy."""
    validation_format: Annotated[str, OneOf(VALIDATION_FORMATS, FORMATS)] | None = None
    """Format of `validation`. Unset: that of train, or indexed if that is megatron_order."""

    @property
    def in_stored_order(self) -> bool:
        """Whether sequences are read in the order of the files."""
        return self.order == "as_stored" if self.order else self.format in OWN_ORDER

    @property
    def resolved_validation_format(self) -> str:
        """The format of `validation`, also where `validation_format` is not set."""
        return self.validation_format or ("indexed" if self.format == "megatron_order" else self.format)

    @model_validator(mode="after")
    def _documents_can_be_packed(self) -> TokenTable:
        if self.packing == "concat":
            return self
        if self.format not in WITH_DOCUMENTS:
            raise validation_error(
                f'packing = "best_fit" needs the borders of documents, which format = "{self.format}" does not have: '
                f"remove packing, or use one of the formats {', '.join(WITH_DOCUMENTS)}"
            )
        if self.order == "as_stored":
            raise validation_error(
                'packing = "best_fit" brings documents into an order of its own: remove order = "as_stored", or packing'
            )
        if self.format == "raw" and any("://" in name for name in self.train or ()):
            raise validation_error(
                'packing = "best_fit" reads raw files from beginning to end to find the documents, so they must be '
                'local: copy them, or use format = "indexed" or "ds", whose index has the borders'
            )
        return self

    @model_validator(mode="after")
    def _format_has_what_it_needs(self) -> TokenTable:
        formats = {self.format, self.resolved_validation_format if self.validation else self.format}
        if self.format_options is not None and formats <= {*OWN_FORMATS}:
            raise validation_error(f'format = "{self.format}" has no options: remove format_options')
        if "raw" in formats and self.dtype is None:
            raise validation_error('format = "raw" needs dtype, the type of the ids: uint16, uint32, int32 or int64')
        if self.dtype is not None and not formats & {*HEADERLESS}:
            raise validation_error(f'format = "{self.format}" stores the dtype itself: remove dtype')
        if (self.index_prefix is None) == (self.format == "megatron_order"):
            raise validation_error(
                'format = "megatron_order" needs index_prefix, the common prefix of its three .npy files'
                if self.index_prefix is None
                else f'index_prefix is for format = "megatron_order", got format = "{self.format}"'
            )
        if self.format == "megatron_order" and (self.order == "shuffled" or len(self.train or ()) != 1):
            raise validation_error(
                "megatron_order replays one pair in its own order: give one prefix as train, and remove order"
            )
        return self


class DomainConfig(TokenTable):
    """[datasets.NAME.domains.DOMAIN]: one weighted domain of a dataset."""

    train: Strings
    """Prefix of a .bin/.idx pair (in other formats: a file), a glob, or a list of them."""
    weight: PositiveFloat
    """Share of the dataset's sequences, relative to the weights of the other domains."""


class DatasetConfig(TokenTable):
    """[datasets.NAME]: a dataset to train on and to validate on."""

    domains: dict[Name, DomainConfig] = Field(default_factory=dict)
    """Weighted domains, in place of `train`."""
    source: TextSourceConfig | None = None
    """The text from which missing token files are prepared."""

    @property
    def packs(self) -> bool:
        """Whether a source of this dataset packs whole documents into sequences."""
        return any(table.packing != "concat" for table in (self, *self.domains.values()))

    @model_validator(mode="after")
    def _tokens_come_from_one_place(self) -> DatasetConfig:
        if self.train and self.domains:
            raise validation_error("give either train or domains, not both")
        if not (self.train or self.domains or self.validation):
            raise validation_error("has no tokens: give train or domains, or only validation to measure a loss on it")
        if self.domains and (self.format != "indexed" or self.order or self.index_prefix or self.packing != "concat"):
            raise validation_error(
                "format, order, packing and index_prefix describe train: with domains, set them in each domain"
            )
        if self.source is not None:
            self._require_preparable(self.source)
        return self

    def _require_preparable(self, source: TextSourceConfig) -> None:
        """`prepare` writes one .bin/.idx pair, and a second one for validation beside it."""
        if self.domains or len(self.train or ()) != 1:
            raise validation_error("with source, train must be one prefix, which `prepare` writes")
        if {self.format, self.resolved_validation_format} != {"indexed"}:
            raise validation_error('with source, format must be "indexed": `prepare` writes .bin/.idx')
        train = _prefix((self.train or ("",))[0])
        if "://" in train or any("://" in name for name in self.validation or ()):
            raise validation_error(
                "with source, train and validation must be local prefixes, which `prepare` writes: prepare the data "
                "with a local prefix, upload the files, and write their URL into a config without source"
            )
        if os.path.basename(train) in ("", ".", ".."):
            raise validation_error("with source, train must be a prefix, such as data/german/train, and not a folder")
        validation = f"{train}-validation"
        if source.holdout and [_prefix(name) for name in self.validation or ()] != [validation]:
            raise validation_error(
                'with source.holdout, validation must be the train prefix followed by "-validation", which is '
                f'"{validation}"'
            )
