"""DataInventory: token counts and vocabulary size of the files that a config names, read before training.

Only headers are read, so a plan over terabytes takes seconds. A file that does not exist yet has the count None.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.common.weights.named_weights import named_weights
from titan_cpt.config.datasets import HEADERLESS, TokenTable
from titan_cpt.config.schema import Config
from titan_cpt.data.document_sample import DocumentSample, PresentFiles, measure_all
from titan_cpt.data.file_names import FileIdentity, file_identity, first_text_file
from titan_cpt.data.formats.array_file import REMOTE_SCAN_TOKENS
from titan_cpt.data.formats.token_files import (
    TokenCounts,
    TokenFiles,
    count_source,
    missing_entries,
    open_source,
    resolve_paths,
)
from titan_cpt.data.formats.token_source import TokenSource
from titan_cpt.data.packing.packed_documents import PackedDocuments
from titan_cpt.data.packing.pieces import LONGEST_SEQUENCE, PackingCounts
from titan_cpt.data.prepare.provenance import TokenizerProvenance, tokenizer_provenance
from titan_cpt.data.sequence_lengths import sequence_lengths
from titan_cpt.data.tokenizer.of_config import (
    base_vocab_size,
    extension_notes,
    fingerprints_of_config,
    vocab_size_of_config,
)
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.errors import DataError, RemoteError, reason_and_remedy
from titan_cpt.object_storage.locations import CacheSettings, Location, RemotePath, is_url


@dataclass(frozen=True)
class _Present:
    """The files of one config key, all of which exist.

    Attributes:
        source: `dataset` or `dataset.domain`.
        key: `train` or `validation`.
        files: the files as the config describes them.
        paths: prefixes of pairs, or files.
    """

    source: str
    key: str
    files: TokenFiles
    paths: list[Location]

    @property
    def where(self) -> str:
        """The dotted config key, for messages."""
        return f"{source_table(self.source)}.{self.key}"

    @property
    def dataset(self) -> str:
        """Name of the dataset, without the domain."""
        return self.source.partition(".")[0]

    @cached_property
    def token_files(self) -> list[tuple[FileIdentity | None, str]]:
        """(identity, name) of each file that contains ids; of a pair, its .bin."""
        names = [f"{path}.bin" if self.files.paired else str(path) for path in self.paths]
        return [(file_identity(name), name) for name in names]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def take_inventory(config: Config, *, log: Callable[[str], None] = _to_stderr) -> DataInventory:
    """Inspect the training data, the validation data and the tokenizer that the config names.

    Args:
        log: prints a line for the user while raw files are read to find the documents that are packed.

    Raises:
        DataError: an existing file is damaged, is a text file, is used for both training and validation of a dataset,
            or was tokenized with another tokenizer.
    """
    train = _present(config, "train")
    validation = _present(config, "validation")
    lengths = sequence_lengths(config)
    counts = {
        (source, seq_len): _counted(files, seq_len, key)
        for source, files in train.items()
        for seq_len, key in lengths[files.dataset].items()
    }
    validation_tokens: dict[str, int | None] = {}
    for source, _ in validation_files(config):
        measured = validation.get(source)
        validation_tokens[source] = _counted(measured, config.training.seq_len).tokens if measured else None
    used = _used_datasets(config)
    notes = [
        *_read_twice(files for files in train.values() if files.dataset in used),
        *_trained_and_measured(train.values(), validation.values()),
        *_absent_weights(config),
        *extension_notes(config),
        *_sampled_checks([*train.values(), *validation.values()]),
    ]
    records = _records(config, [*train.values(), *validation.values()])
    unrecorded = tuple(source for source in train if None in records[source, "train"])
    made = next((record for of_files in records.values() for record in of_files if record is not None), None)
    vocab_size = vocab_size_of_config(config)
    if vocab_size is None and made is not None:
        vocab_size = made.vocab_size
        notes.append(
            f"tokenizer {config.tokenizer.path} does not exist yet; the vocabulary size {vocab_size:,} is from "
            f"{made.record}"
        )
    return DataInventory(
        tokens={**dict.fromkeys(source for source, _ in training_files(config)), **_tokens(counts)},
        vocab_size=vocab_size,
        base_vocab_size=base_vocab_size(config),
        sequences={key: each.sequences for key, each in counts.items() if each.sequences is not None},
        unrecorded=unrecorded,
        validation_tokens=validation_tokens,
        notes=tuple(notes),
        documents=measure_all(
            (
                (source, PresentFiles(each.files, each.paths, _tokens(counts)[source]))
                for source, each in train.items()
                if each.dataset in used
            ),
            _masked_lengths(config),
            config.tokenizer.path,
        ),
        packing=_packing(config, (each for each in train.values() if each.dataset in used), log),
    )


def _masked_lengths(config: Config) -> list[int]:
    """The sequence lengths at which a stage trains with a document mask."""
    by_default = config.training.document_mask
    return [
        stage.seq_len or config.training.seq_len
        for stage in config.stages
        if (by_default if stage.document_mask is None else stage.document_mask)
    ]


def _tokens(counts: Mapping[tuple[str, int], TokenCounts]) -> dict[str, int]:
    return {source: each.tokens for (source, _), each in counts.items()}


def _packing(
    config: Config, train: Iterable[_Present], log: Callable[[str], None]
) -> dict[tuple[str, int], PackingCounts]:
    """Counts of the packed sequences of every source with packing = "best_fit", by source and sequence length.

    Raises:
        DataError: a file is damaged, raw files have no end-of-document id, or sequences are too long to be packed.
    """
    lengths = sequence_lengths(config)
    found: dict[tuple[str, int], PackingCounts] = {}
    for each in train:
        eod_id = _eod_id(config, each.files) if each.files.best_fit else None
        if eod_id is not None:
            documents = PackedDocuments(each.where, each.files, each.paths, eod_id)
            for length, key in lengths[each.dataset].items():
                if length > LONGEST_SEQUENCE:
                    raise DataError(
                        f'{key}: packing = "best_fit" of {source_table(each.source)} allows sequences of up to '
                        f"{LONGEST_SEQUENCE} tokens, got {length}"
                    )
                try:
                    found[each.source, length] = documents.counts(length, log=log)
                except DataError as error:
                    raise type(error)(f"{each.where}: {error}") from None
    return found


def _eod_id(config: Config, files: TokenFiles) -> int | None:
    """The end-of-document id if the files have to be searched for it, otherwise 0; None without a tokenizer."""
    if files.format != "raw":
        return 0
    path = config.tokenizer.path
    return load_tokenizer(path).eod_id if path == "bytes" or Path(path).exists() else None


def _used_datasets(config: Config) -> set[str]:
    """Names of the datasets that a stage trains on or replays."""
    replays = [stage.replay.from_ or () for stage in config.stages if stage.replay]
    return {name for names in (*(stage.dataset for stage in config.stages), *replays) for name in names}


def _present(config: Config, key: str) -> dict[str, _Present]:
    """Return the files of a key, by source, if all of them exist."""
    found = {}
    for source, files in training_files(config) if key == "train" else validation_files(config):
        where = f"{source_table(source)}.{key}"
        _require_token_files(where, files, has_source=_has_source(config, source))
        try:
            missing = missing_entries(files)
            if not missing:
                found[source] = _Present(source, key, files, resolve_paths(files))
                _require_readable(name for _, name in found[source].token_files if not is_url(name))
        except DataError as error:
            raise type(error)(f"{where}: {error}") from None
        absent = next((entry for entry in missing if is_url(entry)), None)
        if absent is not None:
            what = "has no .bin and .idx" if files.paired else "there is no such object"
            raise RemoteError(f"{where}: {absent}: {what} in object storage. Upload it, or correct the name")
    return found


def _require_readable(names: Iterable[str]) -> None:
    """Raise DataError for a file that training could not open; the plan itself needs only its length."""
    for name in names:
        try:
            open(name, "rb", buffering=0).close()
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {reason_and_remedy(error)}") from None


def _counted(each: _Present, seq_len: int, key: str = "training.seq_len") -> TokenCounts:
    """Count tokens and sequences.

    Args:
        key: the config key that sets seq_len, for messages.
    """
    try:
        return count_source(each.files, seq_len, each.paths)
    except DataError as error:
        reason = str(error).replace("training.seq_len", key)
        raise type(error)(f"{each.where}: {reason}") from None


def training_files(config: Config) -> Iterator[tuple[str, TokenFiles]]:
    """Yield (source, training files) for every source: `dataset`, or `dataset.domain` if it has domains."""
    for source, table in _tables(config):
        if table.train:
            dtype = table.dtype if table.format in HEADERLESS else None
            order, options = table.in_stored_order, table.format_options or {}
            cache = cache_settings(config)
            files = TokenFiles(table.train, table.format, dtype, order, table.index_prefix, cache, options)
            yield source, replace(files, best_fit=table.packing == "best_fit")


def validation_files(config: Config) -> Iterator[tuple[str, TokenFiles]]:
    """Yield (name, validation files) for every dataset or domain that has validation data."""
    for source, table in _tables(config):
        if table.validation:
            dtype = table.dtype if table.resolved_validation_format in HEADERLESS else None
            options = table.format_options or {}
            form = table.resolved_validation_format
            yield source, TokenFiles(table.validation, form, dtype, cache=cache_settings(config), options=options)


def cache_settings(config: Config) -> CacheSettings:
    """The block cache of files in object storage."""
    storage = config.storage
    return CacheSettings(storage.resolved_cache_dir, storage.cache_size, storage.block_size)


def open_sources(files: Iterable[tuple[str, TokenFiles]], vocab_size: int) -> dict[str, TokenSource]:
    """Open and check the files of every source; returns the open sources by name.

    Raises:
        DataError: a file is missing or damaged, or contains an id outside the vocabulary.
    """
    return {name: open_source(each, vocab_size) for name, each in files}


def _tables(config: Config) -> Iterator[tuple[str, TokenTable]]:
    for name, dataset in config.datasets.items():
        yield name, dataset
        for domain, table in dataset.domains.items():
            yield f"{name}.{domain}", table


def source_table(source: str) -> str:
    """The dotted name of a source's table in the config, for messages."""
    return f"datasets.{source.replace('.', '.domains.')}"


def _has_source(config: Config, source: str) -> bool:
    return config.datasets[source.partition(".")[0]].source is not None


def _require_token_files(where: str, files: TokenFiles, *, has_source: bool) -> None:
    """Raise DataError for text files and folders, which otherwise count as token files that do not exist yet."""
    if has_source or files.registered:
        return  # `train` is the prefix that `prepare` will write, or whatever a registered format reads
    if (text := first_text_file(files.spec)) is not None:
        raise DataError(
            f"{where}: {text} is text, not tokens: tokenize it with `titan-cpt prepare --input {text} --output "
            f"PREFIX` and write PREFIX here, or set source = {{ text = {text!r} }} and let {where.rpartition('.')[2]} "
            "be the prefix to write"
        )
    local = replace(files, spec=tuple(entry for entry in files.spec if not is_url(entry)), index_prefix=None)
    for entry in missing_entries(local):
        if Path(entry).is_dir():
            ending = ".idx" if files.paired else files.suffix
            inside = next((path for path in Path(entry).glob(f"*{ending}") if path.is_file()), None)
            if inside is not None:
                name = entry.rstrip("/")
                raise DataError(f"{where}: {entry} is a folder: write {name}/* for all its files, or name one file")


def _read_twice(train: Iterable[_Present]) -> Iterator[str]:
    """Yield a note for each pair of sources that read the same file."""
    names: dict[FileIdentity, _Present] = {}
    noted = set()
    for each in train:
        for identity, path in each.token_files:
            first = each if identity is None else names.setdefault(identity, each)
            if first is not each and (first.source, each.source) not in noted:
                noted.add((first.source, each.source))
                yield (
                    f"{first.where} and {each.where} both read {path}: replay, epochs and forgetting treat it as "
                    "different data"
                )


def _trained_and_measured(train: Iterable[_Present], validation: Iterable[_Present]) -> Iterator[str]:
    """Yield a note if a validation-only dataset shares a file with training data; raise DataError for other overlaps.

    Globs such as nanoGPT's data/*.bin easily match the validation file as well. Files are compared by identity, not by
    name: a link or another spelling is the same file.
    """
    measured = {identity: each for each in validation for identity, _ in each.token_files if identity is not None}
    trained = list(train)
    has_training_data = {each.dataset for each in trained}
    noted = set()
    for each in trained:
        for identity, path in each.token_files:
            found = None if identity is None else measured.get(identity)
            if found is None:
                continue
            if found.dataset in has_training_data:
                raise DataError(
                    f"{each.where}: includes {path}, which {found.where} measures: validation would measure text that "
                    "the model was trained on. Narrow the glob, list the files, or use other validation data"
                )
            if (each.source, found.source) not in noted:
                noted.add((each.source, found.source))
                yield f"{found.where}: measures {path}, which {each.where} trains on: it is not unseen data"


def _sampled_checks(present: Iterable[_Present]) -> Iterator[str]:
    """Yield a note if files are in object storage, of which only a sample is checked on open."""
    remote = [each for each in present if any(isinstance(path, RemotePath) for path in each.paths)]
    if remote:
        yield (
            f"{', '.join(each.where for each in remote)}: in object storage: before training, ids are compared with "
            f"the vocabulary in a sample of {REMOTE_SCAN_TOKENS:,} tokens, not in all; every id is checked when it is "
            "read"
        )


def _absent_weights(config: Config) -> Iterator[str]:
    """Yield a note for every stage whose initial weights are not on this machine."""
    for stage in config.stages:
        kind, _, where = (stage.init or "").partition(":")
        if kind == "checkpoint" and is_url(where):
            yield f"stages.{stage.name}.init: {where} is downloaded when training starts"
        elif kind == "checkpoint" and not (named_weights(where).folder / MANIFEST_FILE).exists():
            exists = named_weights(where).folder.exists()
            missing = f"has no {MANIFEST_FILE}, so it is not a checkpoint" if exists else "does not exist yet"
            then = "training stops before this stage if it is still missing"
            yield f"stages.{stage.name}.init: {where} {missing}; {then}"
        if kind == "hf" and not Path(where).is_dir():
            yield f"stages.{stage.name}.init: {where} is not a local folder; it is loaded from the Hugging Face hub"


def _records(config: Config, present: Iterable[_Present]) -> dict[tuple[str, str], list[TokenizerProvenance | None]]:
    """Return the tokenizer of each pair by (source, key); None for a pair without a record and for other formats.

    Raises:
        DataError: a pair was not tokenized with the config's tokenizer, or, if that does not exist yet, two pairs were
            tokenized differently; or tokenizer.add_bos differs from the setting that a pair was made with.
    """
    expected, accepted = fingerprints_of_config(config)
    expected_of = f"tokenizer.path = {config.tokenizer.path!r}"
    extend = config.tokenizer.extend
    base = "" if extend is None else f", that of tokenizer.extend.base = {extend.base!r} is {(accepted or '')[:12]}"
    records: dict[tuple[str, str], list[TokenizerProvenance | None]] = {}
    for each in present:
        records[each.source, each.key] = (
            [tokenizer_provenance(prefix) for prefix in each.paths] if each.files.paired else [None]
        )
        for made in records[each.source, each.key]:
            if made is None:
                continue
            if expected is None and made.fingerprint != accepted:
                expected = made.fingerprint
                expected_of = f"the tokenizer in {made.record}"
            if made.fingerprint not in (expected, accepted):
                own = (expected or accepted or "")[:12]
                raise DataError(
                    f"{each.where}: was made with another tokenizer: {made.record} records {made.vocab_size} ids "
                    f"and fingerprint {made.fingerprint[:12]}; the fingerprint of {expected_of} is {own}{base}. "
                    f"Set tokenizer.path{'' if extend is None else ' or tokenizer.extend.base'} to the one that made "
                    "it, or prepare the data again"
                )
            if made.add_bos != config.tokenizer.add_bos:
                has, have = ("has", "true") if made.add_bos else ("does not have", "false")
                raise DataError(
                    f"{each.where}: {has} a begin-of-document token before each document ({made.record}), but "
                    f"tokenizer.add_bos = {str(config.tokenizer.add_bos).lower()}. Set tokenizer.add_bos = {have}, or "
                    "prepare the data again"
                )
    return records


@dataclass(frozen=True)
class DataInventory:
    """Counts of the files that a config names, before training.

    Attributes:
        tokens: number of tokens of every source (`dataset` or `dataset.domain`); None if its files do not exist yet.
        vocab_size: vocabulary size of the tokenizer; None if it does not exist yet.
        base_vocab_size: that of the tokenizer that it extends ([tokenizer.extend]), whose ids it keeps; None if none.
        sequences: number of sequences by source and sequence length, where the files define them (presequenced,
            megatron_order).
        unrecorded: sources whose files do not record which tokenizer made them.
        validation_tokens: number of tokens of every validation set; None if its files do not exist yet.
        notes: warnings about the files, one sentence each.
        documents: lengths of the documents by (source, sequence length), for the lengths at which a stage has a
            document mask, as far as they are known.
        packing: how documents fill sequences by source and sequence length, of sources with packing = "best_fit".
    """

    tokens: Mapping[str, int | None]
    vocab_size: int | None
    sequences: Mapping[tuple[str, int], int] = field(default_factory=dict)
    unrecorded: tuple[str, ...] = ()
    validation_tokens: Mapping[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    documents: Mapping[tuple[str, int], DocumentSample] = field(default_factory=dict)
    packing: Mapping[tuple[str, int], PackingCounts] = field(default_factory=dict)
    base_vocab_size: int | None = None
