"""Read a plain, .gz, .zst, .bz2 or .xz file in blocks, and report the position in the compressed file."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from titan_cpt.errors import DataError, reason_and_remedy

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
BLOCK_BYTES = 2**20
COMPRESSED_BLOCK_BYTES = 2**17


def read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of the decompressed content, each with the number of bytes read from the file so far.

    Raises:
        DataError: the file cannot be read, or its compressed content is damaged or incomplete.
    """
    try:
        with open(path, "rb") as file:
            yield from decompressed_blocks(file, str(path))
    except OSError as fault:
        raise DataError(f"{path}: cannot be read: {reason_and_remedy(fault)}") from fault


def decompressed_blocks(file: IO[bytes], name: str) -> Iterator[tuple[bytes, int]]:
    """Like `read_blocks`, for an open file; the suffix of `name` says how it is compressed.

    Raises:
        DataError: the compressed content is damaged or incomplete; an empty file is incomplete.
        OSError: the file cannot be read.
    """
    if name.endswith(".zst"):
        yield from _zstandard_blocks(file, name)
    elif name.endswith(".gz"):
        yield from _stream_blocks(file, name, gzip.GzipFile(fileobj=file))
    elif name.endswith(".bz2"):
        yield from _stream_blocks(file, name, bz2.BZ2File(file))
    elif name.endswith(".xz"):
        yield from _stream_blocks(file, name, lzma.LZMAFile(file))  # noqa: SIM115 (_stream_blocks closes it)
    else:
        while block := file.read(BLOCK_BYTES):
            yield block, file.tell()


def _stream_blocks(
    file: IO[bytes], name: str, stream: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile
) -> Iterator[tuple[bytes, int]]:
    with stream:
        while True:
            try:
                block = stream.read(BLOCK_BYTES)
            except (EOFError, zlib.error, lzma.LZMAError) as fault:
                raise DataError(f"{name}: damaged or incomplete ({fault}): copy it again") from fault
            except OSError as fault:
                if fault.errno is not None:  # an error of the disk, not of the content
                    raise
                raise DataError(f"{name}: damaged or incomplete ({fault}): copy it again") from fault
            if not block:
                break
            yield block, file.tell()
    _require_bytes(file, name)


def _zstandard_blocks(file: IO[bytes], name: str) -> Iterator[tuple[bytes, int]]:
    """Decompress frame by frame: the library's stream reader accepts a file that ends within a frame."""
    import zstandard  # imported here because most inputs need no zstandard

    context = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    while block := file.read(COMPRESSED_BLOCK_BYTES):
        while block:
            frame = frame or context.decompressobj()
            try:
                unpacked = frame.decompress(block)
            except zstandard.ZstdError as fault:
                raise DataError(f"{name}: damaged ({fault}): copy it again") from fault
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
            yield unpacked, file.tell()
    if frame is not None:
        raise DataError(f"{name}: ends within a zstd frame: the file is incomplete; copy it again")
    _require_bytes(file, name)


def _require_bytes(file: IO[bytes], name: str) -> None:
    """Raise DataError for a file of 0 bytes: a compressed file is never empty."""
    if file.tell() == 0:
        raise DataError(f"{name}: 0 bytes, which no compressed file has: the file is incomplete; copy it again")
