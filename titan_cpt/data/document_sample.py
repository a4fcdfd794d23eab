"""Lengths of the documents in the sequences of every source, measured in a sample for the plan's FLOPs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from titan_cpt.common.numbers import evenly_spaced
from titan_cpt.data.formats.token_files import TokenFiles, open_source
from titan_cpt.data.packing.document_lengths import document_lengths
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer
from titan_cpt.errors import DataError
from titan_cpt.object_storage.locations import Location, RemotePath

SAMPLE = 1000
"""Number of sequences of a source that are read; all of them if it has no more."""


class PresentFiles(NamedTuple):
    """The files of a source, all of which exist.

    Attributes:
        files: the files as the config describes them.
        paths: the result of `resolve_paths(files)`.
        tokens: number of tokens.
    """

    files: TokenFiles
    paths: Sequence[Location]
    tokens: int


class DocumentSample(NamedTuple):
    """The documents, and parts of documents, in sequences of one length.

    Attributes:
        lengths: their lengths in tokens, ascending.
        counts: how many have each of these lengths.
        sequences: number of sequences that were read.
        available: number of sequences of the source.
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    sequences: int
    available: int

    def mean_span(self, window: int | None = None) -> float:
        """Mean number of positions that a token attends to, without the causal mask: the length of its document.

            sum over documents of n * min(n, window) / sum over documents of n

        Args:
            window: sliding-window size in tokens; None for full attention.
        """
        lengths = np.array(self.lengths, dtype=np.float64)
        tokens = lengths * np.array(self.counts)
        return float((tokens * np.minimum(lengths, window or np.inf)).sum() / tokens.sum())


def measure_all(
    sources: Iterable[tuple[str, PresentFiles]], lengths: Iterable[int], tokenizer_path: str
) -> dict[tuple[str, int], DocumentSample]:
    """`measure_documents` of every source at every sequence length, by (source, length), as far as they are known.

    Args:
        tokenizer_path: `tokenizer.path` of the config; without the file nothing is known.
    """
    lengths = sorted({*lengths})
    if not lengths or (tokenizer_path != "bytes" and not Path(tokenizer_path).exists()):
        return {}
    tokenizer = load_tokenizer(tokenizer_path)
    found = {}
    for name, present in sources:
        for seq_len in lengths:
            measured = measure_documents(present, tokenizer.vocab_size, seq_len, end=tokenizer.eod_id)
            if measured is not None:
                found[name, seq_len] = measured
    return found


def measure_documents(present: PresentFiles, vocab_size: int, seq_len: int, *, end: int) -> DocumentSample | None:
    """The lengths of the documents in evenly spaced sequences of a source.

    Of a source with packing = "best_fit" they are those of its first documents, cut as packing cuts them.

    Args:
        end: the end-of-document id.

    Returns:
        None for files in object storage, and for files that have sequences of another length only.

    Raises:
        DataError: a file is damaged.
    """
    files = present.files
    if any(isinstance(path, RemotePath) for path in present.paths):
        return None
    if files.best_fit:
        return _packed(present, seq_len, end)
    source = open_source(files, vocab_size)
    try:
        available = source.windows(seq_len)
    except DataError:  # replay cuts these sequences; their documents are not looked for
        return None
    chosen = evenly_spaced(available, SAMPLE)
    found = [_lengths(source.window(number, seq_len)[:-1], end) for number in chosen]
    return _counted(found, len(chosen), available) if found else None


def _packed(present: PresentFiles, seq_len: int, end: int) -> DocumentSample | None:
    """The pieces of the first documents, as many tokens as `SAMPLE` full sequences have; None without tokens."""
    pieces: list[npt.NDArray[np.int64]] = []
    tokens = 0
    for lengths in document_lengths(present.files, present.paths, end):
        whole, tails = lengths // seq_len, lengths % seq_len
        pieces += [np.full(int(whole.sum()), seq_len), tails[tails > 0]]
        tokens += int(lengths.sum())
        if tokens >= SAMPLE * seq_len:
            break
    if not tokens:
        return None
    return _counted(pieces, -(-tokens // seq_len), -(-present.tokens // seq_len))


def _counted(lengths: Sequence[npt.NDArray[np.int64]], sequences: int, available: int) -> DocumentSample:
    values, counts = np.unique(np.concatenate(lengths), return_counts=True)
    return DocumentSample(tuple(values.tolist()), tuple(counts.tolist()), sequences=sequences, available=available)


def _lengths(inputs_L: npt.NDArray[np.int64], end: int) -> npt.NDArray[np.int64]:
    """The lengths of the documents of one sequence; the last one may be cut off."""
    borders = np.concatenate(([0], np.flatnonzero(inputs_L == end) + 1, [len(inputs_L)]))
    lengths = np.diff(borders)
    return lengths[lengths > 0]
