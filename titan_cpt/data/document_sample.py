"""Lengths of the documents in the sequences of every source, measured in a sample for the plan's FLOPs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from titan_cpt.common.numbers import evenly_spaced
from titan_cpt.data.formats.token_files import TokenFiles, open_source
from titan_cpt.data.tokenizer.tokenizer import load_tokenizer

SAMPLE = 1000
"""Number of sequences of a source that are read; all of them if it has no more."""


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


def measure_documents(files: TokenFiles, vocab_size: int, seq_len: int, *, end: int) -> DocumentSample | None:
    """The lengths of the documents in evenly spaced sequences of a source; None if its files are in object storage.

    Args:
        end: the end-of-document id.

    Raises:
        DataError: a file is damaged.
    """
    source = open_source(files, vocab_size)
    if source.is_remote:
        return None
    available = source.windows(seq_len)
    chosen = evenly_spaced(available, SAMPLE)
    found = [_lengths(source.window(number, seq_len)[:-1], end) for number in chosen]
    lengths, counts = np.unique(np.concatenate(found), return_counts=True) if found else (np.ones(0), np.ones(0))
    return DocumentSample(tuple(map(int, lengths)), tuple(map(int, counts)), sequences=len(chosen), available=available)


def measure_all(
    sources: Iterable[tuple[str, TokenFiles]], lengths: Iterable[int], tokenizer_path: str
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
    for name, files in sources:
        for seq_len in lengths:
            measured = measure_documents(files, tokenizer.vocab_size, seq_len, end=tokenizer.eod_id)
            if measured is not None and measured.lengths:
                found[name, seq_len] = measured
    return found


def _lengths(inputs_L: npt.NDArray[np.int64], end: int) -> npt.NDArray[np.int64]:
    """The lengths of the documents of one sequence; the last one may be cut off."""
    borders = np.concatenate(([0], np.flatnonzero(inputs_L == end) + 1, [len(inputs_L)]))
    lengths = np.diff(borders)
    return lengths[lengths > 0]
