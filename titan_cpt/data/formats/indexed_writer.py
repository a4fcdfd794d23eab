"""Write Megatron's .bin/.idx pairs (as its IndexedDatasetBuilder does), atomically.

Both files are written under temporary names, synced to the disk and renamed, the .bin first and the .idx last. So an
existing .idx proves that the pair is complete, even after a power failure. indexed_layout.py describes the format.
"""

import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from titan_cpt.common.files import fsync
from titan_cpt.data.formats.indexed_layout import DTYPES, HEADER, MAGIC, VERSION, pair_paths, read_header
from titan_cpt.errors import DataError

LARGEST_UINT16_VOCABULARY = 65_500  # exclusive; Megatron stores larger vocabularies as int32
LARGEST_DOCUMENT_TOKENS = 2**31 - 1  # sizes are int32
BLOCK_SEQUENCES = 1_000_000
COPY_BYTES = 16 * 2**20


class IndexedWriter:
    """Writes documents of tokens in sequence. The pair appears under its name when the writer is closed.

    If the `with` block raises, both temporary files are removed.
    """

    def __init__(self, prefix: Path, vocab_size: int, *, durable: bool = True) -> None:
        """Begin a pair.

        Args:
            prefix: the path without .bin and .idx.
            vocab_size: ids are in [0, vocab_size).
            durable: sync the files to the disk; without it, a power failure may leave a damaged pair, and an existing
                pair must have the same content.
        """
        self.prefix = prefix
        self.vocab_size = vocab_size
        self._durable = durable
        self.tokens = 0
        self._code = dtype_code(vocab_size)
        self._sizes = array("i")
        self._temporary = _temporary_prefix(prefix)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(pair_paths(self._temporary)[0], "wb")  # noqa: SIM115  lives until close()

    def add_document(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Append one document. The caller adds the end-of-document token.

        Raises:
            DataError: an id is outside the vocabulary, or the document is too long for the format.
        """
        self.add_documents(np.asarray(tokens, dtype=np.int64), np.array([len(tokens)], dtype=np.int64))

    def add_documents(self, tokens: npt.NDArray[np.integer[Any]], sizes: npt.NDArray[np.int64]) -> None:
        """Append several documents.

        Args:
            tokens: the documents, concatenated.
            sizes: number of tokens of each document.

        Raises:
            DataError: an id is outside the vocabulary, or a document is too long for the format.
        """
        assert int(sizes.sum()) == len(tokens), f"{len(tokens)} tokens, sizes add up to {int(sizes.sum())}"
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            wrong = int(tokens[(tokens < 0) | (tokens >= self.vocab_size)][0])
            raise DataError(f"{self.prefix}: id {wrong}; allowed are ids from 0 to {self.vocab_size - 1}")
        if len(sizes) and int(sizes.max()) > LARGEST_DOCUMENT_TOKENS:
            raise DataError(
                f"{self.prefix}: a document has {int(sizes.max())} tokens; the format allows at most "
                f"{LARGEST_DOCUMENT_TOKENS}: split the document"
            )
        self._file.write(np.ascontiguousarray(tokens, dtype=DTYPES[self._code]).data)
        self._sizes.frombytes(sizes.astype(np.int32).tobytes())
        self.tokens += len(tokens)

    def close(self) -> None:
        """Write the index, sync both files and rename them, the .idx last."""
        _flush(self._file, durable=self._durable)
        self._file.close()
        sizes = np.frombuffer(self._sizes, dtype=np.int32)
        index = pair_paths(self._temporary)[1]
        _write_index(index, self._code, len(sizes), lambda: _blocks(sizes), durable=self._durable)
        rename_pair(self._temporary, self.prefix, durable=self._durable)

    def abort(self) -> None:
        """Remove the temporary files."""
        self._file.close()
        _remove_pair(self._temporary)

    def __enter__(self) -> "IndexedWriter":
        """Return the writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        """Close the pair, or abort it if the block raised."""
        if fault is None:
            self.close()
        else:
            self.abort()


def dtype_code(vocab_size: int) -> int:
    """Return the dtype code that Megatron chooses: 8 (uint16) for a vocabulary below 65,500, otherwise 4 (int32)."""
    return 8 if vocab_size < LARGEST_UINT16_VOCABULARY else 4


class PairJoiner:
    """Concatenates finished pairs into one, in the order in which they are appended, with constant memory.

    The pair appears under its name when the joiner is closed. If the `with` block raises, the temporary files are
    removed.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """Begin the pair at `prefix` (the path without .bin and .idx), for pairs of this vocabulary size."""
        self.prefix = prefix
        self._code = dtype_code(vocab_size)
        self._parts: list[Path] = []
        self._sequences = 0
        self._temporary = _temporary_prefix(prefix)
        self._file: IO[bytes] = open(pair_paths(self._temporary)[0], "wb")  # noqa: SIM115  lives until close()

    def append(self, part: Path) -> None:
        """Append the tokens of a finished pair.

        Raises:
            DataError: it is missing or damaged, or its dtype is not that of the vocabulary size.
        """
        bin_path, idx = pair_paths(part)
        header = read_header(idx)
        if header.dtype != DTYPES[self._code]:
            expected = DTYPES[self._code].name
            raise DataError(f"{part}: has dtype {header.dtype.name}, not {expected}: prepare it again")
        with open(bin_path, "rb") as source:
            shutil.copyfileobj(source, self._file, COPY_BYTES)
        self._parts.append(part)
        self._sequences += header.sequences

    def close(self) -> None:
        """Write the index, sync both files and rename them, the .idx last."""
        _flush(self._file)
        self._file.close()
        _write_index(pair_paths(self._temporary)[1], self._code, self._sequences, lambda: _sizes_of(self._parts))
        rename_pair(self._temporary, self.prefix)

    def abort(self) -> None:
        """Remove the temporary files."""
        self._file.close()
        _remove_pair(self._temporary)

    def __enter__(self) -> "PairJoiner":
        """Return the joiner itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        """Close the pair, or abort it if the block or the closing raises."""
        try:
            if fault is None:
                self.close()
        except BaseException:
            self.abort()
            raise
        if fault is not None:
            self.abort()


def concatenate(parts: Sequence[Path], prefix: Path, vocab_size: int) -> None:
    """Concatenate finished pairs into one at `prefix`, in the order given; see PairJoiner."""
    with PairJoiner(prefix, vocab_size) as joiner:
        for part in parts:
            joiner.append(part)


def rename_pair(source: Path, target: Path, *, durable: bool = True) -> None:
    """Rename a complete pair within a file system, replacing an existing pair of that name.

    Args:
        source: prefix of the pair.
        target: prefix of the new names.
        durable: sync the folder. Without it, the existing pair must have the same content: it is whole at any moment,
            because another process may be reading it.
    """
    if durable:
        pair_paths(target)[1].unlink(missing_ok=True)  # an old index must never be beside a new .bin
    for old, new in zip(pair_paths(source), pair_paths(target), strict=True):
        os.replace(old, new)
    if durable:
        fsync(target.parent)  # the renames outlive a power failure


def _temporary_prefix(prefix: Path) -> Path:
    """A hidden name of this process, in the target's folder because a rename does not cross file systems."""
    return prefix.with_name(f".{prefix.name}.{os.getpid()}.tmp")


def _remove_pair(prefix: Path) -> None:
    for path in pair_paths(prefix):
        path.unlink(missing_ok=True)


def _flush(file: IO[bytes], *, durable: bool = True) -> None:
    file.flush()
    if durable:
        os.fsync(file.fileno())


def _blocks(sizes: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.int32]]:
    for start in range(0, len(sizes), BLOCK_SEQUENCES):
        yield sizes[start : start + BLOCK_SEQUENCES]


def _sizes_of(shards: Sequence[Path]) -> Iterator[npt.NDArray[np.int32]]:
    """Yield the sizes of all sequences of several pairs, in blocks."""
    for shard in shards:
        idx = pair_paths(shard)[1]
        remaining = read_header(idx).sequences
        with open(idx, "rb") as file:
            file.seek(HEADER.size)
            while remaining:
                count = min(remaining, BLOCK_SEQUENCES)
                yield np.frombuffer(file.read(4 * count), dtype="<i4")
                remaining -= count


def _write_index(
    path: Path,
    code: int,
    sequences: int,
    size_blocks: Callable[[], Iterator[npt.NDArray[np.int32]]],
    *,
    durable: bool = True,
) -> None:
    """Write an .idx: first the sizes, then the pointers computed from them; `size_blocks` is called twice."""
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, sequences, sequences + 1))
        for sizes in size_blocks():
            file.write(sizes.astype("<i4").tobytes())
        start_bytes = 0
        for sizes in size_blocks():
            ends = start_bytes + np.cumsum(sizes.astype(np.int64)) * DTYPES[code].itemsize
            file.write(np.concatenate(([start_bytes], ends[:-1])).astype("<i8").tobytes())
            start_bytes = int(ends[-1])
        for start in range(0, sequences + 1, BLOCK_SEQUENCES):
            file.write(np.arange(start, min(start + BLOCK_SEQUENCES, sequences + 1), dtype="<i8").tobytes())
        _flush(file, durable=durable)
