"""Megatron's .bin/.idx format: its header, and the checks that every file passes before a token of it is used.

A pair PREFIX.bin/PREFIX.idx is laid out so (little-endian; n sequences, d document indices):

    .idx   9 bytes magic | u64 version 1 | u8 dtype code | u64 n | u64 d
           | n int32 sizes in tokens | n int64 pointers in bytes into .bin | d int64 document indices, the first 0
    .bin   the tokens
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from titan_cpt.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices: 34 bytes
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}  # 6 and 7 are left out: writers of different age disagree on what they mean

FULL_CHECK_SEQUENCES = 16_000_000  # an index of more sequences is checked in evenly spread blocks
DAMAGED = "the file is damaged or was not copied whole: copy it again, or prepare it again"


class Header(NamedTuple):
    """What the first 34 bytes of an .idx say."""

    dtype: np.dtype[Any]
    sequences: int
    document_indices: int

    def sizes_at(self, sequence: int) -> int:
        """Byte of the .idx at which the size of this sequence lies."""
        return HEADER.size + 4 * sequence

    def pointer_at(self, sequence: int) -> int:
        """Byte of the .idx at which the pointer of this sequence lies."""
        return self.sizes_at(self.sequences) + 8 * sequence

    def document_at(self, document: int) -> int:
        """Byte of the .idx at which this document index lies; past the last one, the length of the file."""
        return self.pointer_at(self.sequences) + 8 * document


def pair_paths(prefix: Path) -> tuple[Path, Path]:
    """The .bin and the .idx of a prefix, which may itself hold dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def read_header(idx: Path) -> Header:
    """Return the header of an .idx whose length agrees with it; nothing of the size that it claims is allocated.

    Raises:
        DataError: the file is missing, of another format, or of another length than its header asks for.
    """
    size, _ = size_and_mtime(idx)
    head = read_head(idx)[: HEADER.size]
    if len(head) < HEADER.size:
        raise DataError(f"{idx}: {len(head)} bytes; the header alone has {HEADER.size}: {DAMAGED}")
    magic, version, code, sequences, document_indices = HEADER.unpack(head)
    if magic != MAGIC:
        raise DataError(f"{idx}: begins with {magic!r}; Megatron's index begins with {MAGIC!r}: it is another format")
    if version != VERSION:
        raise DataError(f"{idx}: version {version} of the format; allowed is {VERSION}")
    if code not in DTYPES:
        why = " (writers disagree on what 6 and 7 mean)" if code in (6, 7) else ""
        allowed = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPES.items())
        raise DataError(f"{idx}: dtype code {code}{why}; allowed are {allowed}. Write the data again with one of them")
    header = Header(DTYPES[code], sequences, document_indices)
    if document_indices < 1 or size != header.document_at(document_indices):
        raise DataError(
            f"{idx}: {size} bytes; the header's {sequences} sequences and {document_indices} document indices take "
            f"{header.document_at(max(document_indices, 1))}: {DAMAGED}"
        )
    return header


def size_and_mtime(path: Path) -> tuple[int, int]:
    """Length in bytes and time of change in ns."""
    try:
        status = path.stat()
    except OSError as fault:
        raise DataError(f"{path}: {fault.strerror}; a pair is a .bin and an .idx of the same name") from fault
    return status.st_size, status.st_mtime_ns


def open_binary(path: Path) -> IO[bytes]:
    """The file, open for reading, or a DataError that says why it cannot be."""
    try:
        return open(path, "rb")
    except OSError as fault:
        raise DataError(f"{path}: cannot be read: {fault.strerror}") from fault


def read_head(path: Path) -> bytes:
    """The first 64 KiB of a file."""
    with open_binary(path) as file:
        return file.read(65_536)


def read_exactly(fd: int, count_bytes: int, offset: int) -> bytes:
    """Bytes [offset, offset + count_bytes), fewer only where the file ends."""
    data = os.pread(fd, count_bytes, offset)
    while len(data) < count_bytes:  # one call moves 2 GiB at most
        more = os.pread(fd, count_bytes - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def checked_tokens(bin_path: Path, bin_bytes: int, header: Header) -> int:
    """Tokens in a .bin of whole tokens."""
    if bin_bytes % header.dtype.itemsize or (bin_bytes and not header.sequences):
        raise DataError(
            f"{bin_path}: {bin_bytes} bytes; its index has {header.sequences} sequences of {header.dtype.name}, "
            f"{header.dtype.itemsize} bytes each token: {DAMAGED}"
        )
    return bin_bytes // header.dtype.itemsize


def check_index(fd: int, idx: Path, header: Header, bin_bytes: int) -> None:
    """Raise DataError unless sizes, pointers, document indices and the length of the .bin agree."""
    for start, stop in spans(header.sequences, block=65_536, limit=FULL_CHECK_SEQUENCES):
        check_pointers(fd, idx, header, bin_bytes, (start, stop))
    for start, stop in spans(header.document_indices, block=65_536, limit=FULL_CHECK_SEQUENCES):
        upto = min(stop + 1, header.document_indices)  # one more, so that blocks are compared with each other too
        data = read_exactly(fd, 8 * (upto - start), header.document_at(start))
        indices = np.frombuffer(data, "<i8")
        wrong = (start == 0 and indices[0] != 0) or (np.diff(indices) < 0).any()
        if wrong or indices[-1] > header.sequences:
            raise DataError(
                f"{idx}: document indices {start} to {upto - 1} do not rise from 0 to at most the {header.sequences} "
                f"sequences: {DAMAGED}"
            )


def check_pointers(fd: int, idx: Path, header: Header, bin_bytes: int, span: tuple[int, int]) -> None:
    """Raise DataError unless each sequence of a span ends where the next one, or the .bin behind the last, begins."""
    start, stop = span
    sizes = np.frombuffer(read_exactly(fd, 4 * (stop - start), header.sizes_at(start)), "<i4").astype(np.int64)
    upto = min(stop + 1, header.sequences)
    pointers = np.frombuffer(read_exactly(fd, 8 * (upto - start), header.pointer_at(start)), "<i8")
    ends = np.append(pointers[1:], bin_bytes) if stop == header.sequences else pointers[1:]
    if start == 0 and pointers[0] != 0:
        raise DataError(f"{idx}: the first sequence begins at byte {pointers[0]}, allowed is 0: {DAMAGED}")
    wrong = np.flatnonzero((pointers[: stop - start] + sizes * header.dtype.itemsize != ends) | (sizes < 0))
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{idx}: sequence {start + first} has {sizes[first]} tokens from byte {pointers[first]} of the .bin, and "
            f"what follows it begins at byte {ends[first]}: {DAMAGED}"
        )


def spans(total: int, *, block: int, limit: int) -> Iterator[tuple[int, int]]:
    """Blocks [start, stop) that cover everything up to `limit`, and beyond it that much, evenly, both ends included."""
    if total <= limit:
        yield from ((start, min(start + block, total)) for start in range(0, total, block))
        return
    count = max(2, limit // block)
    for number in range(count):
        start = (total - block) * number // (count - 1)
        yield max(start, 0), min(max(start, 0) + block, total)
