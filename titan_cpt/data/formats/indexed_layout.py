"""Megatron's .bin/.idx format (IndexedDataset): byte layout of the index, and the checks made before a token is used.

Layout of PREFIX.idx and PREFIX.bin, little-endian, for n sequences and d document indices:

    .idx   9 bytes magic | u64 version 1 | u8 dtype code | u64 n | u64 d
           | n int32 sizes in tokens | n int64 pointers in bytes into .bin | d int64 document indices, the first 0
    .bin   the tokens
"""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from titan_cpt.errors import DataError, reason_and_remedy
from titan_cpt.object_storage.filesystem import find, stat
from titan_cpt.object_storage.locations import Location, RemotePath, with_ending
from titan_cpt.object_storage.remote_file import RemoteFile, read_remote_head

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices: 34 bytes
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}  # without 6 and 7: old and new writers disagree on what they mean

FULL_CHECK_SEQUENCES = 16_000_000  # a larger index is checked in evenly spaced blocks
REMOTE_CHECK_SEQUENCES = 1_000_000  # the same for an index in object storage, of which 20 MB are transferred
DAMAGED = "the file is damaged or incomplete: copy it again, or prepare it again"


class Header(NamedTuple):
    """The first 34 bytes of an .idx, decoded."""

    dtype: np.dtype[Any]
    sequences: int
    document_indices: int

    def sizes_at(self, sequence: int) -> int:
        """Byte offset in the .idx of the size of a sequence."""
        return HEADER.size + 4 * sequence

    def pointer_at(self, sequence: int) -> int:
        """Byte offset in the .idx of the pointer of a sequence."""
        return self.sizes_at(self.sequences) + 8 * sequence

    def document_at(self, document: int) -> int:
        """Byte offset in the .idx of a document index; one past the last is the length of the file."""
        return self.pointer_at(self.sequences) + 8 * document


def pair_paths(prefix: Path) -> tuple[Path, Path]:
    """Return the .bin and the .idx of a local prefix, which may contain dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def pair_locations(prefix: Location) -> tuple[Location, Location]:
    """Return the .bin and the .idx of a prefix that is local or in object storage."""
    return with_ending(prefix, ".bin"), with_ending(prefix, ".idx")


def read_header(idx: Location) -> Header:
    """Return the header of an .idx. Its counts are compared with the file size before anything is allocated from them.

    Raises:
        DataError: the file is missing, has another format, or does not have the length that its header implies.
    """
    size, _ = size_and_mtime(idx)
    head = read_head(idx)[: HEADER.size]
    if len(head) < HEADER.size:
        raise DataError(f"{idx}: {len(head)} bytes; the header takes {HEADER.size}: {DAMAGED}")
    magic, version, code, sequences, document_indices = HEADER.unpack(head)
    if magic != MAGIC:
        raise DataError(f"{idx}: begins with {magic!r}; Megatron's index begins with {MAGIC!r}: this is another format")
    if version != VERSION:
        raise DataError(f"{idx}: index version {version}; only version {VERSION} is supported")
    if code not in DTYPES:
        why = " (old and new writers disagree on what 6 and 7 mean)" if code in (6, 7) else ""
        allowed = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPES.items())
        raise DataError(f"{idx}: dtype code {code}{why}; allowed are {allowed}. Write the data again with one of these")
    header = Header(DTYPES[code], sequences, document_indices)
    if document_indices < 1 or size != header.document_at(document_indices):
        raise DataError(
            f"{idx}: {size} bytes; the {sequences} sequences and {document_indices} document indices take "
            f"{header.document_at(max(document_indices, 1))}: {DAMAGED}"
        )
    return header


def size_and_mtime(path: Location) -> tuple[int, int]:
    """Return the length in bytes and the modification time in ns; that of an object in storage is 0."""
    if isinstance(path, RemotePath):
        return stat(path.url).size, 0
    try:
        status = path.stat()
    except OSError as fault:
        raise DataError(f"{path}: {fault.strerror}; a pair is a .bin and an .idx of the same name") from fault
    return status.st_size, status.st_mtime_ns


def open_binary(path: Path) -> IO[bytes]:
    """Open a local file for reading.

    Raises:
        DataError: with the reason of the operating system.
    """
    try:
        return open(path, "rb")
    except OSError as fault:
        raise DataError(f"{path}: cannot be read: {reason_and_remedy(fault)}") from fault


class OpenFile:
    """A file open for reading by ranges, local or in object storage; a context manager that closes it.

    Raises:
        DataError: with the reason of the operating system.
    """

    def __init__(self, path: Location, remote: RemoteFile | None = None) -> None:
        """Open a file.

        Args:
            path: its location.
            remote: the object, if it has been looked up already.
        """
        self._remote = RemoteFile(path) if isinstance(path, RemotePath) and remote is None else remote
        try:
            self._fd = -1 if isinstance(path, RemotePath) else os.open(path, os.O_RDONLY)
        except OSError as fault:
            raise DataError(f"{path}: cannot be read: {reason_and_remedy(fault)}") from fault

    def __enter__(self) -> "OpenFile":
        """The file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, count_bytes: int, offset: int) -> bytes:
        """Return bytes [offset, offset + count_bytes), fewer only if the file ends before."""
        if self._remote is not None:
            return self._remote.read(offset, count_bytes)
        return read_exactly(self._fd, count_bytes, offset)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes [start, stop) of each range; a remote file is read in one round trip."""
        if self._remote is not None:
            return self._remote.read_ranges(ranges)
        return [read_exactly(self._fd, stop - start, start) for start, stop in ranges]

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch byte ranges [start, stop) of a remote file that will be read next, all at once."""
        if self._remote is not None:
            self._remote.fetch(ranges)


def read_head(path: Location) -> bytes:
    """Return the first 64 KiB of a file."""
    if isinstance(path, RemotePath):
        return read_remote_head(path)
    with OpenFile(path) as file:
        return file.read(65_536, 0)


def file_exists(path: Location) -> bool:
    """Whether there is a file or an object of that name."""
    return find(path.url) is not None if isinstance(path, RemotePath) else path.exists()


def read_exactly(fd: int, count_bytes: int, offset: int) -> bytes:
    """Return bytes [offset, offset + count_bytes), fewer only if the file ends before."""
    data = os.pread(fd, count_bytes, offset)
    while len(data) < count_bytes:  # one call reads at most 2 GiB
        more = os.pread(fd, count_bytes - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def checked_tokens(bin_path: Location, bin_bytes: int, header: Header) -> int:
    """Return the number of tokens in a .bin.

    Raises:
        DataError: its length is not a multiple of the token size, or the index has no sequences.
    """
    if bin_bytes % header.dtype.itemsize or (bin_bytes and not header.sequences):
        raise DataError(
            f"{bin_path}: {bin_bytes} bytes; its index has {header.sequences} sequences of {header.dtype.name}, "
            f"{header.dtype.itemsize} bytes per token: {DAMAGED}"
        )
    return bin_bytes // header.dtype.itemsize


def check_index(file: OpenFile, idx: Location, header: Header, bin_bytes: int) -> None:
    """Raise DataError unless sizes, pointers, document indices and the length of the .bin are consistent."""
    limit = REMOTE_CHECK_SEQUENCES if isinstance(idx, RemotePath) else FULL_CHECK_SEQUENCES
    blocks = list(spans(header.sequences, block=65_536, limit=limit))
    documents = list(spans(header.document_indices, block=65_536, limit=limit))
    file.fetch(
        [(header.sizes_at(start), header.sizes_at(stop)) for start, stop in blocks]
        + [(header.pointer_at(start), header.pointer_at(stop) + 8) for start, stop in blocks]
        + [(header.document_at(start), header.document_at(stop) + 8) for start, stop in documents]
    )
    for start, stop in blocks:
        check_pointers(file, idx, header, bin_bytes, (start, stop))
    for start, stop in documents:
        upto = min(stop + 1, header.document_indices)  # one more, to compare adjacent blocks as well
        data = file.read(8 * (upto - start), header.document_at(start))
        indices = np.frombuffer(data, "<i8")
        wrong = (start == 0 and indices[0] != 0) or (np.diff(indices) < 0).any()
        if wrong or indices[-1] > header.sequences:
            raise DataError(
                f"{idx}: document indices {start} to {upto - 1} do not increase from 0 to at most the number of "
                f"sequences, {header.sequences}: {DAMAGED}"
            )


def check_pointers(file: OpenFile, idx: Location, header: Header, bin_bytes: int, span: tuple[int, int]) -> None:
    """Raise DataError unless each sequence of a span ends where the next one begins, and the last at the .bin's end."""
    start, stop = span
    upto = min(stop + 1, header.sequences)
    ranges = [(header.sizes_at(start), header.sizes_at(stop)), (header.pointer_at(start), header.pointer_at(upto))]
    sizes_data, pointers_data = file.read_ranges(ranges)
    sizes = np.frombuffer(sizes_data, "<i4").astype(np.int64)
    pointers = np.frombuffer(pointers_data, "<i8")
    ends = np.append(pointers[1:], bin_bytes) if stop == header.sequences else pointers[1:]
    if start == 0 and pointers[0] != 0:
        raise DataError(f"{idx}: the first sequence begins at byte {pointers[0]} of the .bin, not at 0: {DAMAGED}")
    wrong = np.flatnonzero((pointers[: stop - start] + sizes * header.dtype.itemsize != ends) | (sizes < 0))
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{idx}: sequence {start + first} has {sizes[first]} tokens from byte {pointers[first]} of the .bin, but "
            f"the next one begins at byte {ends[first]}: {DAMAGED}"
        )


def spans(total: int, *, block: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield blocks [start, stop) of range(total): all of it up to `limit`, otherwise about `limit`, evenly spaced.

    The first and the last block are always included.
    """
    if total <= limit:
        yield from ((start, min(start + block, total)) for start in range(0, total, block))
        return
    count = max(2, limit // block)
    for number in range(count):
        start = (total - block) * number // (count - 1)
        yield max(start, 0), min(max(start, 0) + block, total)
