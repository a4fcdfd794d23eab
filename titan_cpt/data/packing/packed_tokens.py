"""PackedTokens: a source whose sequences are whole documents, packed by best fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from titan_cpt.data.batch import NO_TARGET
from titan_cpt.data.formats.indexed import TokenStream
from titan_cpt.data.packing.index_file import VERSION, PackingIndex
from titan_cpt.data.packing.packed_documents import PackedDocuments


class PackedRow(NamedTuple):
    """One packed sequence.

    Attributes:
        tokens: int64 [L + 1]: inputs are all but the last; end-of-document ids after the last document.
        targets: int64 [L]: the next token of the document; NO_TARGET at its end and in the padding.
        starts: the positions, except 0, where a document or the padding begins.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    starts: tuple[int, ...]


class PackedTokens:
    """The packed sequences of one source; like a TokenSource, but not every position has a target.

    Attributes:
        tokens: number of tokens.
        in_stored_order: False: each epoch reads the sequences in a seeded permutation.
        is_remote: a file is in object storage.
    """

    in_stored_order = False

    def __init__(self, stream: TokenStream, documents: PackedDocuments, *, log: Callable[[str], None]) -> None:
        """Keep the parts; the index of a sequence length is opened, or built, when it is first needed.

        Args:
            stream: the tokens of all documents.
            documents: where they begin and end.
            log: prints a line for the user while an index is built.
        """
        self.tokens = stream.tokens
        self.is_remote = stream.is_remote
        self._stream = stream
        self._documents = documents
        self._log: Callable[[str], None] | None = log
        self._indices: dict[int, PackingIndex] = {}

    def windows(self, seq_len: int) -> int:
        """Return the number of sequences. The first call for a length opens the packing index, or builds it.

        Raises:
            DataError: a token file is damaged.
            AccessError: the index cannot be written.
        """
        return self._index(seq_len).counts.sequences

    def row(self, number: int, seq_len: int) -> PackedRow:
        """Return a sequence.

        Raises:
            DataError: a file changed since it was opened, or an id is not in the vocabulary.
        """
        tokens = np.full(seq_len + 1, self._documents.eod_id, np.int64)
        targets = np.full(seq_len, NO_TARGET, np.int64)
        starts = []
        position = 0
        for piece in self._index(seq_len).pieces(number):
            starts.append(position)
            read = self._stream.read(piece.start, piece.length + piece.continues)
            tokens[position : position + len(read)] = read
            targets[position : position + len(read) - 1] = read[1:]
            position += piece.length
        starts.append(position)
        return PackedRow(tokens, targets, tuple(start for start in starts if 0 < start < seq_len))

    def target_tokens(self, numbers: Sequence[int] | NDArray[np.int64], seq_len: int) -> int:
        """Return how many positions of these sequences have a target."""
        return int(self._index(seq_len).targets(np.asarray(numbers, np.int64)).sum())

    def targets_within(self, number: int, seq_len: int, start: int, stop: int) -> int:
        """Return how many of the positions [start, stop) of a sequence have a target."""
        position = total = 0
        for piece in self._index(seq_len).pieces(number):
            end = position + piece.length - (not piece.continues)
            total += max(0, min(end, stop) - max(position, start))
            position += piece.length
        return total

    def fetch(self, numbers: Sequence[int], seq_len: int) -> None:
        """Fetch sequences of remote files that will be read soon into the local cache, concurrently."""
        if self.is_remote:
            pieces = [piece for number in numbers for piece in self._index(seq_len).pieces(number)]
            self._stream.fetch_ranges((piece.start, piece.start + piece.length + piece.continues) for piece in pieces)

    def fingerprint(self) -> str:
        """Return a digest of the content, of the document borders and of how they are packed."""
        parts = f"best_fit {VERSION} {self._documents.borders} {self._stream.fingerprint()}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything except the function that prints."""
        return {**self.__dict__, "_log": None}

    def _index(self, seq_len: int) -> PackingIndex:
        if seq_len not in self._indices:
            self._indices[seq_len] = self._documents.index(seq_len, log=self._log or (lambda line: None))
        return self._indices[seq_len]
