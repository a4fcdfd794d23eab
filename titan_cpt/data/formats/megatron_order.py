"""An earlier run's order, replayed: the document, sample and shuffle index that GPT-NeoX and Megatron-LM save as .npy.

For a .bin/.idx pair whose entries are called documents here:

    doc_idx      [d]         the documents in the order in which they are laid end to end, all epochs of it
    sample_idx   [n + 1, 2]  where each sample begins: a place in doc_idx, and a token of that document
    shuffle_idx  [n]         which sample is the i-th to be seen

Sample s runs from sample_idx[s] to sample_idx[s + 1], that token included: seq_len + 1 tokens, the last one the first
of sample s + 1. So the i-th sequence is sample shuffle_idx[i]. Indices are int32 or int64, the shuffle uint32 or int64.

Where we differ: GPT-NeoX never gives its very last sample (its length is one short) and pads short ones; here all n are
there, and a sample of another length is refused.

Sources: gpt-neox megatron/data/gpt2_dataset.py; Megatron-LM megatron/core/datasets/gpt_dataset.py.
"""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titan_cpt.data.formats.array_file import ArrayFile, npy_header
from titan_cpt.data.formats.indexed import FULL_SCAN_TOKENS, IndexedTokens, count_tokens
from titan_cpt.data.formats.indexed_layout import pair_paths, read_header, spans
from titan_cpt.errors import DataError

# Document, sample and shuffle index, as GPT-NeoX and old Megatron-LM name them, and as Megatron core does.
ENDINGS = (
    ("_doc_idx.npy", "_sample_idx.npy", "_shuffle_idx.npy"),
    ("-document_index.npy", "-sample_index.npy", "-shuffle_index.npy"),
)
FULL_CHECK_NUMBERS = 16_000_000  # of each index; beyond that as many in evenly spread blocks
MEASURED_SAMPLES = 8_192  # whose length is checked on open; every other one is when it is read


class MegatronOrder:
    """A pair's samples in an earlier run's order; a TokenSource.

    Attributes:
        tokens: of the pair.
    """

    in_stored_order = True

    def __init__(self, prefix: Path, index_prefix: str, vocab_size: int | None = None) -> None:
        """Open and check the pair and its three indices.

        Args:
            prefix: of the .bin/.idx pair.
            index_prefix: what the names of the three .npy have in common.
            vocab_size: see TokenFile.

        Raises:
            DataError: a file is missing or damaged, an index points outside of what it indexes, samples are not of one
                length, or an id is not in the vocabulary.
        """
        self._pair = IndexedTokens(prefix, vocab_size=vocab_size, scan_tokens=FULL_SCAN_TOKENS)
        self._order = _Order(prefix, index_prefix)
        self._order.check()
        self.tokens = self._pair.tokens

    def windows(self, seq_len: int) -> int:
        """How many samples the order has.

        Raises:
            DataError: they are of another length.
        """
        return self._order.count(seq_len)

    def window(self, number: int, seq_len: int) -> npt.NDArray[np.int64]:
        """The seq_len + 1 tokens of the sample that was seen at this place.

        Raises:
            DataError: a file changed since it was opened, the index points outside, or the sample has another length.
        """
        sample = int(self._order.shuffle.read(number, 1)[0])
        pieces = self._order.pieces(sample)
        self._order.check_length(sample, pieces, seq_len)
        return np.concatenate([self._pair.read(start, count) for start, count in pieces])

    def fingerprint(self) -> str:
        """Hexadecimal identity of the tokens and of the three indices."""
        files = (self._pair, self._order.documents, self._order.samples, self._order.shuffle)
        return hashlib.sha256("\n".join(file.digest for file in files).encode()).hexdigest()


def count_order(prefix: Path, index_prefix: str, seq_len: int) -> tuple[int, int]:
    """Tokens of the pair, and samples of the order: from headers and the first sample alone.

    Raises:
        DataError: a file is missing or damaged, or the samples are of another length.
    """
    return count_tokens(prefix), _Order(prefix, index_prefix).count(seq_len)


def missing_index_files(index_prefix: str) -> list[str]:
    """Return the names of an index that is not there yet; [] if all of one naming are."""
    names = [[f"{index_prefix}{ending}" for ending in endings] for endings in ENDINGS]
    absent = [[name for name in three if not Path(name).exists()] for three in names]
    return min(absent, key=len)


class _Order:
    """The three indices, and where the documents lie that they speak of."""

    def __init__(self, prefix: Path, index_prefix: str) -> None:
        idx = pair_paths(prefix)[1]
        self._header = read_header(idx)
        self._idx = idx
        sequences, at = self._header.sequences, self._header
        self._sizes = ArrayFile(idx, np.dtype("<i4"), offset_bytes=at.sizes_at(0), count=sequences)
        self._pointers = ArrayFile(idx, np.dtype("<i8"), offset_bytes=at.pointer_at(0), count=sequences)
        endings = next((each for each in ENDINGS if Path(f"{index_prefix}{each[0]}").exists()), ENDINGS[0])
        paths = [Path(f"{index_prefix}{ending}") for ending in endings]
        self.documents, self.samples, self.shuffle = (
            _index_file(path, columns) for path, columns in zip(paths, (1, 2, 1), strict=True)
        )
        self.total = self.samples.count // 2 - 1
        if self.total < 1 or self.shuffle.count != self.total:
            raise DataError(
                f"{self.shuffle.path}: {self.shuffle.count} entries; {self.samples.path.name} has {self.total} "
                "samples, and the two must agree: the three files come from different runs, or one is not whole"
            )

    def count(self, seq_len: int) -> int:
        """How many samples there are, the first one measured."""
        self.check_length(0, self.pieces(0), seq_len)
        return self.total

    def check(self) -> None:
        """Raise DataError where an index points outside, or samples differ in length from the first."""
        self._check_range(self.shuffle, self.total, "samples")
        self._check_range(self.documents, self._header.sequences, f"documents of {self._idx.name}")
        length = sum(count for _, count in self.pieces(0))
        for start, stop in spans(self.total, block=1_024, limit=MEASURED_SAMPLES):
            for sample in range(start, stop):
                self.check_length(sample, self.pieces(sample), length - 1)

    def pieces(self, sample: int) -> list[tuple[int, int]]:
        """(first token of the .bin, how many) of each piece of a document that a sample consists of."""
        first, offset, last, until = self.samples.read(2 * sample, 4).tolist()
        if not 0 <= first <= last < self.documents.count:
            raise DataError(
                f"{self.samples.path}: sample {sample} goes from place {first} to {last} of "
                f"{self.documents.path.name}, which has {self.documents.count}: the files do not belong together, or "
                "one is damaged"
            )
        found = []
        for place, document in enumerate(self.documents.read(first, last - first + 1).tolist(), first):
            size, begins = self._document(document)
            start, stop = offset if place == first else 0, until + 1 if place == last else size
            if not 0 <= start <= stop <= size:
                raise DataError(
                    f"{self.samples.path}: sample {sample} takes tokens {start} to {stop} of document {document}, "
                    f"which has {size} in {self._idx}: the order was made for other data"
                )
            found.append((begins + start, stop - start))
        return found

    def check_length(self, sample: int, pieces: list[tuple[int, int]], seq_len: int) -> None:
        """Raise DataError unless the pieces are seq_len + 1 tokens."""
        length = sum(count for _, count in pieces)
        if length != seq_len + 1:
            raise DataError(
                f"{self.samples.path}: sample {sample} has {length} tokens; allowed is training.seq_len + 1 = "
                f"{seq_len + 1} for every one: set training.seq_len to what the order was made for. Orders that pad or "
                "cut samples cannot be replayed"
            )

    def _document(self, document: int) -> tuple[int, int]:
        """Size and first token of a document."""
        if not 0 <= document < self._header.sequences:
            raise DataError(
                f"{self.documents.path}: document {document}; {self._idx} has documents 0 to "
                f"{self._header.sequences - 1}: the order was made for other data"
            )
        begins_bytes = int(self._pointers.read(document, 1)[0])
        return int(self._sizes.read(document, 1)[0]), begins_bytes // self._header.dtype.itemsize

    def _check_range(self, index: ArrayFile, size: int, what: str) -> None:
        for start, stop in spans(index.count, block=65_536, limit=FULL_CHECK_NUMBERS):
            numbers = index.read(start, stop - start)
            wrong = np.flatnonzero((numbers < 0) | (numbers >= size))
            if len(wrong):
                first = int(wrong[0])
                raise DataError(
                    f"{index.path}: entry {start + first} is {numbers[first]}, and there are {size} {what}: the order "
                    "was made for other data, or the file is damaged"
                )


def _index_file(path: Path, columns: int) -> ArrayFile:
    """A .npy of `columns` columns, read as one run of numbers."""
    if not path.exists():
        names = " or ".join(", ".join(f"PREFIX{ending}" for ending in endings) for endings in ENDINGS)
        raise DataError(f"{path}: is missing; index_prefix is what three files have in common: {names}")
    header = npy_header(path)
    if header is None:
        raise DataError(f"{path}: does not begin as a .npy file does: it is damaged, or another format")
    dtype, shape, offset_bytes = header
    if len(shape) != columns or shape[1:] != (2,) * (columns - 1) or dtype.itemsize not in (4, 8):
        wanted = "[samples + 1, 2]" if columns == 2 else "[n]"
        raise DataError(f"{path}: {dtype.name} of shape {list(shape)}; allowed are int32, int64 or uint32 of {wanted}")
    return ArrayFile(path, dtype, offset_bytes=offset_bytes, count=int(np.prod(shape, dtype=np.int64)))
