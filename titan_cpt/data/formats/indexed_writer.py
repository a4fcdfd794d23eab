"""Megatron's .bin/.idx pairs, written: whole or not at all.

Both files are written under temporary names, flushed to the disk and renamed, .bin first and .idx last: whoever finds
an .idx finds the whole pair, whenever the power failed. The format is in indexed_layout.py.
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

LARGEST_UINT16_VOCABULARY = 65_500  # Megatron's border between uint16 and int32, exclusive
LARGEST_DOCUMENT_TOKENS = 2**31 - 1  # sizes are int32
BLOCK_SEQUENCES = 1_000_000
COPY_BYTES = 16 * 2**20


class IndexedWriter:
    """Writes documents of tokens one behind another; the pair appears when it is closed, and not before.

    In a `with` block an exception leaves nothing behind.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """Begin a pair at `prefix` (the path without .bin and .idx) for ids in [0, vocab_size)."""
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.tokens = 0
        self._code = dtype_code(vocab_size)
        self._sizes = array("i")
        self._temporary = _temporary_prefix(prefix)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(pair_paths(self._temporary)[0], "wb")  # noqa: SIM115  lives until close()

    def add_document(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Append one document, its end-of-document token included by the caller.

        Raises:
            DataError: an id is not in the vocabulary, or the document is too long for the format.
        """
        self.add_documents(np.asarray(tokens, dtype=np.int64), np.array([len(tokens)], dtype=np.int64))

    def add_documents(self, tokens: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> None:
        """Append many documents that lie in `tokens` one behind another, `sizes` tokens each.

        Raises:
            DataError: an id is not in the vocabulary, or a document is too long for the format.
        """
        assert int(sizes.sum()) == len(tokens), f"{len(tokens)} tokens, sizes add up to {int(sizes.sum())}"
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            wrong = int(tokens[(tokens < 0) | (tokens >= self.vocab_size)][0])
            raise DataError(f"{self.prefix}: id {wrong}; allowed are ids from 0 to {self.vocab_size - 1}")
        if len(sizes) and int(sizes.max()) > LARGEST_DOCUMENT_TOKENS:
            raise DataError(
                f"{self.prefix}: a document of {int(sizes.max())} tokens; the format allows "
                f"{LARGEST_DOCUMENT_TOKENS}: split it"
            )
        self._file.write(tokens.astype(DTYPES[self._code]).tobytes())
        self._sizes.frombytes(sizes.astype(np.int32).tobytes())
        self.tokens += len(tokens)

    def close(self) -> None:
        """Write the index, flush both files to the disk and give them their names, the .idx last."""
        _flush(self._file)
        self._file.close()
        sizes = np.frombuffer(self._sizes, dtype=np.int32)
        _write_index(pair_paths(self._temporary)[1], self._code, len(sizes), lambda: _blocks(sizes))
        rename_pair(self._temporary, self.prefix)

    def abort(self) -> None:
        """Leave nothing of what was written."""
        self._file.close()
        _remove_pair(self._temporary)

    def __enter__(self) -> "IndexedWriter":
        """Return the writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        """Close the pair, or abort it if the block failed."""
        if fault is None:
            self.close()
        else:
            self.abort()


def dtype_code(vocab_size: int) -> int:
    """Megatron's choice: 8 (uint16) for a vocabulary below 65,500, otherwise 4 (int32)."""
    return 8 if vocab_size < LARGEST_UINT16_VOCABULARY else 4


def concatenate(shards: Sequence[Path], prefix: Path, vocab_size: int) -> None:
    """Join finished pairs into one at `prefix`, in the order given: bytes are copied, memory stays small.

    Raises:
        DataError: a shard is missing, damaged, or of another number type than `vocab_size` asks for.
    """
    code = dtype_code(vocab_size)
    headers = [read_header(pair_paths(shard)[1]) for shard in shards]
    for shard, header in zip(shards, headers, strict=True):
        if header.dtype != DTYPES[code]:
            raise DataError(f"{shard}: holds {header.dtype.name}, the others {DTYPES[code].name}: prepare it again")
    temporary = _temporary_prefix(prefix)
    bin_path, idx_path = pair_paths(temporary)
    try:
        with open(bin_path, "wb") as target:
            for shard in shards:
                with open(pair_paths(shard)[0], "rb") as source:
                    shutil.copyfileobj(source, target, COPY_BYTES)
            _flush(target)
        _write_index(idx_path, code, sum(header.sequences for header in headers), lambda: _sizes_of(shards))
    except BaseException:
        _remove_pair(temporary)
        raise
    rename_pair(temporary, prefix)


def rename_pair(source: Path, target: Path) -> None:
    """Move a whole pair to another name in the same file system; a pair of that name is replaced."""
    pair_paths(target)[1].unlink(missing_ok=True)  # an old index must never stand beside a new .bin
    for old, new in zip(pair_paths(source), pair_paths(target), strict=True):
        os.replace(old, new)
    fsync(target.parent)  # the renames outlive a power failure


def _temporary_prefix(prefix: Path) -> Path:
    """Hidden, beside the target (a rename does not cross file systems), and this process's own."""
    return prefix.with_name(f".{prefix.name}.{os.getpid()}.tmp")


def _remove_pair(prefix: Path) -> None:
    for path in pair_paths(prefix):
        path.unlink(missing_ok=True)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _blocks(sizes: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.int32]]:
    for start in range(0, len(sizes), BLOCK_SEQUENCES):
        yield sizes[start : start + BLOCK_SEQUENCES]


def _sizes_of(shards: Sequence[Path]) -> Iterator[npt.NDArray[np.int32]]:
    """The sizes of all sequences of some pairs, a block at a time."""
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
    path: Path, code: int, sequences: int, size_blocks: Callable[[], Iterator[npt.NDArray[np.int32]]]
) -> None:
    """Write an .idx from two passes over the sizes: the sizes themselves, then the pointers that follow from them."""
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
        _flush(file)
