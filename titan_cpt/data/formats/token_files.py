"""TokenFiles: the token files of one source as the config describes them; find, count and open them.

To add a format, add a module to this folder and a case to each function below; registered.py opens the formats of
other packages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from titan_cpt.config.datasets import OWN_FORMATS
from titan_cpt.data.formats.array_file import TokenFile
from titan_cpt.data.formats.datatrove import DS_SUFFIX, DsTokens, count_ds
from titan_cpt.data.formats.indexed import IndexedTokens, TokenStream, count_tokens, find_prefixes, missing_prefixes
from titan_cpt.data.formats.megatron_order import MegatronOrder, count_order, missing_index_files
from titan_cpt.data.formats.presequenced import Presequenced, count_presequenced
from titan_cpt.data.formats.raw import RawTokens, count_raw, find_files, missing_files
from titan_cpt.data.formats.registered import RegisteredTokens, count_windows, open_registered
from titan_cpt.data.formats.token_source import TokenSource
from titan_cpt.errors import DataError
from titan_cpt.object_storage.locations import CacheSettings, Location


@dataclass(frozen=True)
class TokenFiles:
    """The files of one source and their format.

    Attributes:
        spec: prefixes, paths or globs.
        format: value of the config key `format`.
        dtype: dtype of headerless files; None if the files themselves define it.
        in_stored_order: each epoch reads the windows in stored order, not permuted.
        index_prefix: common prefix of the three index files of a GPTDataset, for format megatron_order.
        cache: the block cache of files in object storage.
        options: keyword arguments of a registered format.
        best_fit: training packs whole documents into sequences.
    """

    spec: tuple[str, ...]
    format: str = "indexed"
    dtype: str | None = None
    in_stored_order: bool = False
    index_prefix: str | None = None
    cache: CacheSettings | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    best_fit: bool = False

    @property
    def registered(self) -> bool:
        """Whether another package registers the format."""
        return self.format not in OWN_FORMATS

    @property
    def paired(self) -> bool:
        """Whether the files are .bin/.idx pairs, named by their prefix."""
        return self.format in ("indexed", "megatron_order") or (self.format == "presequenced" and self.dtype is None)

    @property
    def suffix(self) -> str:
        """The file name suffix that the format requires, or an empty string."""
        return DS_SUFFIX if self.format == "ds" else ""


class TokenCounts(NamedTuple):
    """Counts from file headers.

    Attributes:
        tokens: number of tokens.
        sequences: number of sequences, if the files define them; None if windows are cut from a token stream.
    """

    tokens: int
    sequences: int | None


def missing_entries(files: TokenFiles) -> list[str]:
    """Return the entries of the spec, and the index files, that do not exist yet."""
    if files.registered:
        return list(files.spec) if open_registered(files.format, files.spec, files.options) is None else []
    names = missing_prefixes(files.spec) if files.paired else missing_files(files.spec, suffix=files.suffix)
    return names + (missing_index_files(files.index_prefix) if files.index_prefix is not None else [])


def resolve_paths(files: TokenFiles) -> list[Location]:
    """Return the prefixes or files that the spec names, in order. Entries of a registered format may be no files.

    Raises:
        DataError: an entry matches no file, or a file that another entry named.
    """
    if files.registered:
        return [path for entry in files.spec if (path := Path(entry)).is_file()]
    if not files.paired:
        return find_files(files.spec, suffix=files.suffix, cache=files.cache)
    prefixes = find_prefixes(files.spec, files.cache)
    if files.format == "megatron_order" and len(prefixes) != 1:
        raise DataError(
            f"{', '.join(files.spec)}: names {len(prefixes)} pairs; a Megatron order belongs to one pair: name one"
        )
    return prefixes


def count_source(files: TokenFiles, seq_len: int, paths: Sequence[Location] = ()) -> TokenCounts:
    """Count tokens and sequences from the headers only.

    Args:
        files: the files of a source.
        seq_len: tokens per sequence, without the last target.
        paths: the result of `resolve_paths(files)`, if the caller has it already.

    Raises:
        DataError: a file is damaged, or its sequences have another length.
    """
    if files.registered:
        reader = open_registered(files.format, files.spec, files.options)
        if reader is None:
            raise DataError(f"{', '.join(files.spec)}: not found by format {files.format!r}")
        return TokenCounts(int(reader.tokens), count_windows(reader, seq_len) if hasattr(reader, "windows") else None)
    paths = paths or resolve_paths(files)
    if files.index_prefix is not None:
        return TokenCounts(*count_order(paths[0], files.index_prefix, seq_len))
    if files.format == "ds":
        return TokenCounts(sum(map(count_ds, paths)), None)
    tokens = sum(count_tokens(path) if files.dtype is None else count_raw(path, files.dtype) for path in paths)
    if files.format == "presequenced":
        return TokenCounts(tokens, count_presequenced(paths, tokens, seq_len, paired=files.paired))
    return TokenCounts(tokens, None)


def open_source(files: TokenFiles, vocab_size: int) -> TokenSource:
    """Open and check all files of a source.

    Raises:
        DataError: a file is missing or damaged, or contains an id outside the vocabulary.
    """
    if files.registered:
        return RegisteredTokens(
            files.format, files.spec, files.options, vocab_size=vocab_size, in_stored_order=files.in_stored_order
        )
    paths = resolve_paths(files)
    if files.index_prefix is not None:
        return MegatronOrder(paths[0], files.index_prefix, vocab_size)
    open_file: Callable[..., TokenFile] = IndexedTokens
    if files.format == "ds":
        open_file = DsTokens
    elif files.dtype is not None:
        open_file = partial(RawTokens, dtype=files.dtype)
    stream = Presequenced if files.format == "presequenced" else TokenStream
    return stream(paths, vocab_size, open_file=open_file, in_stored_order=files.in_stored_order)
