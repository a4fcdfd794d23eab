"""The data order of an earlier run, from the GPTDataset index files (.npy) that GPT-NeoX and Megatron-LM save.

For a .bin/.idx pair, whose entries are called documents here, the three index files are:

    doc_idx      [d]         document index: the documents of all epochs, in the order of their concatenation
    sample_idx   [n + 1, 2]  sample index: start of each sample, as (position in doc_idx, token of that document)
    shuffle_idx  [n]         shuffle index: the i-th sequence to train on is sample shuffle_idx[i]

Sample s contains the tokens from sample_idx[s] to sample_idx[s + 1] inclusive: seq_len + 1 tokens, the last of which is
the first token of sample s + 1. Document and sample index are int32 or int64, the shuffle index uint32 or int64.

Differences: GPT-NeoX never returns its last sample (its length is one short) and pads short samples. Here all n samples
are returned, and a sample of another length is an error.

Sources: gpt-neox megatron/data/gpt2_dataset.py; Megatron-LM megatron/core/datasets/gpt_dataset.py.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from titan_cpt.data.file_names import name_exists
from titan_cpt.data.formats.array_file import ArrayFile, npy_header
from titan_cpt.data.formats.indexed import FULL_SCAN_TOKENS, IndexedTokens, count_tokens
from titan_cpt.data.formats.indexed_layout import file_exists, pair_locations, read_header, spans
from titan_cpt.errors import DataError
from titan_cpt.object_storage.locations import Location, RemotePath, located

# Document, sample and shuffle index as GPT-NeoX and old Megatron-LM name them, and as Megatron core names them.
ENDINGS = (
    ("_doc_idx.npy", "_sample_idx.npy", "_shuffle_idx.npy"),
    ("-document_index.npy", "-sample_index.npy", "-shuffle_index.npy"),
)
FULL_CHECK_NUMBERS = 16_000_000  # entries of each index file checked on open; of a larger file, evenly spaced blocks
MEASURED_SAMPLES = 8_192  # samples whose length is checked on open; the others are checked when they are read


class MegatronOrder:
    """The samples of a .bin/.idx pair in the order of an earlier run; a TokenSource.

    Attributes:
        tokens: number of tokens of the pair.
        is_remote: the pair is in object storage.
    """

    in_stored_order = True

    def __init__(self, prefix: Location, index_prefix: str, vocab_size: int | None = None) -> None:
        """Open and check the pair and its three index files.

        Args:
            prefix: prefix of the .bin/.idx pair.
            index_prefix: common prefix of the three .npy files.
            vocab_size: see TokenFile.

        Raises:
            DataError: a file is missing or damaged, an index is out of range, the samples differ in length, or an id is
                outside the vocabulary.
        """
        self._pair = IndexedTokens(prefix, vocab_size=vocab_size, scan_tokens=FULL_SCAN_TOKENS)
        self._order = _Order(prefix, index_prefix)
        self._order.check()
        self.tokens = self._pair.tokens
        self.is_remote = isinstance(prefix, RemotePath)

    def windows(self, seq_len: int) -> int:
        """Return the number of samples.

        Raises:
            DataError: the samples have another length.
        """
        return self._order.count(seq_len)

    def window(self, number: int, seq_len: int) -> npt.NDArray[np.int64]:
        """Return the seq_len + 1 tokens of the sample at position `number` of the training order, int64.

        Raises:
            DataError: a file changed since it was opened, an index is out of range, or the sample has another length.
        """
        sample = int(self._order.shuffle.read(number, 1)[0])
        pieces = self._order.pieces(sample)
        self._order.check_length(sample, pieces, seq_len)
        return np.concatenate([self._pair.read(start, count) for start, count in pieces])

    def fetch(self, numbers: Sequence[int], seq_len: int) -> None:
        """Fetch the tokens of samples that will be read soon, if the pair is in object storage."""
        if self.is_remote:
            samples = [int(self._order.shuffle.read(number, 1)[0]) for number in numbers]
            pieces = [piece for sample in samples for piece in self._order.pieces(sample)]
            self._pair.fetch([(start, start + count) for start, count in pieces])

    def fingerprint(self) -> str:
        """Return a hexadecimal digest of the tokens and the three index files."""
        files = (self._pair, self._order.documents, self._order.samples, self._order.shuffle)
        return hashlib.sha256("\n".join(file.digest for file in files).encode()).hexdigest()


def count_order(prefix: Location, index_prefix: str, seq_len: int) -> tuple[int, int]:
    """Count the tokens of the pair and the samples of the order, from the headers and the first sample.

    Raises:
        DataError: a file is missing or damaged, or the samples have another length.
    """
    return count_tokens(prefix), _Order(prefix, index_prefix).count(seq_len)


def missing_index_files(index_prefix: str) -> list[str]:
    """Return the missing index files, of the naming scheme that misses fewest; [] if one scheme is complete."""
    names = [[f"{index_prefix}{ending}" for ending in endings] for endings in ENDINGS]
    absent = [[name for name in three if not name_exists(name)] for three in names]
    return min(absent, key=len)


class _Order:
    """The three index files, and the positions of their documents in the .bin."""

    def __init__(self, prefix: Location, index_prefix: str) -> None:
        idx = pair_locations(prefix)[1]
        self._header = read_header(idx)
        self._idx = idx
        header = self._header
        self._sizes = ArrayFile(idx, np.dtype("<i4"), offset_bytes=header.sizes_at(0), count=header.sequences)
        self._pointers = ArrayFile(idx, np.dtype("<i8"), offset_bytes=header.pointer_at(0), count=header.sequences)
        endings = next((each for each in ENDINGS if name_exists(f"{index_prefix}{each[0]}")), ENDINGS[0])
        cache = prefix.cache if isinstance(prefix, RemotePath) else None
        paths = [located(f"{index_prefix}{ending}", cache) for ending in endings]
        self.documents, self.samples, self.shuffle = (
            _index_file(path, columns) for path, columns in zip(paths, (1, 2, 1), strict=True)
        )
        self.total = self.samples.count // 2 - 1
        if self.total < 1 or self.shuffle.count != self.total:
            raise DataError(
                f"{self.shuffle.path}: {self.shuffle.count} entries, but {self.samples.path.name} has {self.total} "
                "samples: the files come from different runs, or one is incomplete"
            )

    def count(self, seq_len: int) -> int:
        """Return the number of samples, after checking the length of the first one."""
        self.check_length(0, self.pieces(0), seq_len)
        return self.total

    def check(self) -> None:
        """Raise DataError if an index is out of range or the samples differ in length."""
        self._check_range(self.shuffle, self.total, "samples")
        self._check_range(self.documents, self._header.sequences, f"documents of {self._idx.name}")
        length = sum(count for _, count in self.pieces(0))
        for start, stop in spans(self.total, block=1_024, limit=MEASURED_SAMPLES):
            for sample in range(start, stop):
                self.check_length(sample, self.pieces(sample), length - 1)

    def pieces(self, sample: int) -> list[tuple[int, int]]:
        """Return (start token in the .bin, number of tokens) for each piece of a document in a sample."""
        first, offset, last, until = self.samples.read(2 * sample, 4).tolist()
        if not 0 <= first <= last < self.documents.count:
            raise DataError(
                f"{self.samples.path}: sample {sample} spans entries {first} to {last} of "
                f"{self.documents.path.name}, which has {self.documents.count}: the files come from different runs, or "
                "one is damaged"
            )
        pieces_found = []
        for position, document in enumerate(self.documents.read(first, last - first + 1).tolist(), first):
            size, begins = self._document(document)
            start = offset if position == first else 0
            stop = until + 1 if position == last else size
            if not 0 <= start <= stop <= size:
                raise DataError(
                    f"{self.samples.path}: sample {sample} takes tokens {start} to {stop} of document {document}, "
                    f"which has {size} in {self._idx}: the index files belong to other data"
                )
            pieces_found.append((begins + start, stop - start))
        return pieces_found

    def check_length(self, sample: int, pieces: list[tuple[int, int]], seq_len: int) -> None:
        """Raise DataError unless the pieces add up to seq_len + 1 tokens."""
        length = sum(count for _, count in pieces)
        if length != seq_len + 1:
            raise DataError(
                f"{self.samples.path}: sample {sample} has {length} tokens; allowed is training.seq_len + 1 = "
                f"{seq_len + 1} for each: set training.seq_len to that of the run that saved the order. Orders with "
                "padded or truncated samples are not supported"
            )

    def _document(self, document: int) -> tuple[int, int]:
        """Return the size of a document and its first token in the .bin."""
        if not 0 <= document < self._header.sequences:
            raise DataError(
                f"{self.documents.path}: contains document {document}; {self._idx} has documents 0 to "
                f"{self._header.sequences - 1}: the index files belong to other data"
            )
        begins_bytes = int(self._pointers.read(document, 1)[0])
        return int(self._sizes.read(document, 1)[0]), begins_bytes // self._header.dtype.itemsize

    def _check_range(self, index: ArrayFile, size: int, items: str) -> None:
        for start, stop in spans(index.count, block=65_536, limit=FULL_CHECK_NUMBERS):
            numbers = index.read(start, stop - start)
            wrong = np.flatnonzero((numbers < 0) | (numbers >= size))
            if len(wrong):
                first = int(wrong[0])
                raise DataError(
                    f"{index.path}: entry {start + first} is {numbers[first]}, but there are {size} {items}: the index "
                    "files belong to other data, or this one is damaged"
                )


def _index_file(path: Location, columns: int) -> ArrayFile:
    """Open an index file of `columns` columns as a flat array."""
    if not file_exists(path):
        names = " or ".join(", ".join(f"PREFIX{ending}" for ending in endings) for endings in ENDINGS)
        raise DataError(f"{path}: is missing; index_prefix is the common prefix of three files: {names}")
    header = npy_header(path)
    if header is None:
        raise DataError(f"{path}: does not begin like a .npy file: it is damaged, or has another format")
    dtype, shape, offset_bytes = header
    if len(shape) != columns or shape[1:] != (2,) * (columns - 1) or dtype.itemsize not in (4, 8):
        wanted = "[samples + 1, 2]" if columns == 2 else "[n]"
        raise DataError(f"{path}: {dtype.name} of shape {list(shape)}; allowed are int32, int64 or uint32 of {wanted}")
    return ArrayFile(path, dtype, offset_bytes=offset_bytes, count=int(np.prod(shape, dtype=np.int64)))
