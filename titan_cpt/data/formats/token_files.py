"""What a table of the config says of its files, and what follows: which files, how many sequences, an open source.

A new format has a file of its own beside this one, and a line in each of the functions below.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from titan_cpt.data.formats.array_file import TokenFile
from titan_cpt.data.formats.datatrove import DS_SUFFIX, DsTokens, count_ds
from titan_cpt.data.formats.indexed import IndexedTokens, TokenStream, count_tokens, find_prefixes, missing_prefixes
from titan_cpt.data.formats.megatron_order import MegatronOrder, count_order, missing_index_files
from titan_cpt.data.formats.presequenced import Presequenced, count_presequenced
from titan_cpt.data.formats.raw import RawTokens, count_raw, find_files, missing_files
from titan_cpt.data.formats.token_source import TokenSource
from titan_cpt.errors import DataError


@dataclass(frozen=True)
class TokenFiles:
    """Files of one source, and how they are read.

    Attributes:
        spec: prefixes, paths or globs.
        format: a format of the config's `format` key.
        dtype: number type of headerless files; None where the format tells it.
        in_stored_order: sequences are seen as they lie.
        index_prefix: of Megatron's three index files, for format megatron_order.
    """

    spec: tuple[str, ...]
    format: str = "indexed"
    dtype: str | None = None
    in_stored_order: bool = False
    index_prefix: str | None = None

    @property
    def paired(self) -> bool:
        """Whether they are .bin/.idx pairs, named by their prefix."""
        return self.format in ("indexed", "megatron_order") or (self.format == "presequenced" and self.dtype is None)

    @property
    def suffix(self) -> str:
        """The ending that files of this format have, where it is fixed."""
        return DS_SUFFIX if self.format == "ds" else ""


class TokenCounts(NamedTuple):
    """What headers tell.

    Attributes:
        tokens: count.
        sequences: count where they are not the windows of a stream; None where they are.
    """

    tokens: int
    sequences: int | None


def missing_entries(files: TokenFiles) -> list[str]:
    """The entries of the spec, and the index files, that are not there yet; [] if all are."""
    names = missing_prefixes(files.spec) if files.paired else missing_files(files.spec, suffix=files.suffix)
    return names + (missing_index_files(files.index_prefix) if files.index_prefix is not None else [])


def resolve_paths(files: TokenFiles) -> list[Path]:
    """The prefixes or files that the spec names, in order.

    Raises:
        DataError: an entry names nothing, or something twice.
    """
    if not files.paired:
        return find_files(files.spec, suffix=files.suffix)
    prefixes = find_prefixes(files.spec)
    if files.format == "megatron_order" and len(prefixes) != 1:
        raise DataError(f"{', '.join(files.spec)}: names {len(prefixes)} pairs; an order belongs to one: name that one")
    return prefixes


def count_source(files: TokenFiles, seq_len: int, paths: Sequence[Path] = ()) -> TokenCounts:
    """Tokens and sequences, from headers alone.

    Args:
        paths: what `resolve_paths` returned for these files, where the caller has it.

    Raises:
        DataError: a file is damaged, or its sequences are of another length.
    """
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
    """Open and check all files.

    Raises:
        DataError: a file is missing or damaged, or holds an id that the tokenizer does not know.
    """
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
