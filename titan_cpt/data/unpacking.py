"""The bytes of a plain, .gz or .zst file, block by block, with how far the reading has come on the disk."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from titan_cpt.errors import DataError

BLOCK_BYTES = 2**20
PACKED_BLOCK_BYTES = 2**17


def read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of the unpacked content, each with the bytes of the file that were read so far.

    Raises:
        DataError: the file is missing, or packed content is damaged or ends early.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix == ".gz":
                yield from _gzip_blocks(file, path)
            elif path.suffix == ".zst":
                yield from _zstandard_blocks(file, path)
            else:
                while block := file.read(BLOCK_BYTES):
                    yield block, file.tell()
    except OSError as fault:
        raise DataError(f"{path}: cannot be read: {fault.strerror or fault}") from fault


def _gzip_blocks(file: IO[bytes], path: Path) -> Iterator[tuple[bytes, int]]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        while True:
            try:
                block = unpacked.read(BLOCK_BYTES)
            except (EOFError, zlib.error, gzip.BadGzipFile) as fault:
                raise DataError(f"{path}: damaged or cut short ({fault}): copy it again") from fault
            if not block:
                return
            yield block, file.tell()


def _zstandard_blocks(file: IO[bytes], path: Path) -> Iterator[tuple[bytes, int]]:
    """Frame by frame: the library's own stream reader takes a file that ends within a frame for a whole one."""
    import zstandard  # most inputs are not packed so

    context = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    while block := file.read(PACKED_BLOCK_BYTES):
        while block:
            frame = frame or context.decompressobj()
            try:
                unpacked = frame.decompress(block)
            except zstandard.ZstdError as fault:
                raise DataError(f"{path}: damaged ({fault}): copy it again") from fault
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
            yield unpacked, file.tell()
    if frame is not None:
        raise DataError(f"{path}: ends within a zstd frame: it was cut short; copy it again")
