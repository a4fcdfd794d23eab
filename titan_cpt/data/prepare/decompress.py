"""The bytes of a plain, .gz, .zst, .bz2 or .xz file, block by block, with how far the reading has come on the disk."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from titan_cpt.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
BLOCK_BYTES = 2**20
PACKED_BLOCK_BYTES = 2**17


def read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of the unpacked content, each with the bytes of the file that were read so far.

    Raises:
        DataError: the file is missing, or packed content is damaged or ends early.
    """
    try:
        with open(path, "rb") as file:
            yield from decompressed_blocks(file, str(path))
    except OSError as fault:
        raise DataError(f"{path}: cannot be read: {fault.strerror or fault}") from fault


def decompressed_blocks(file: IO[bytes], name: str) -> Iterator[tuple[bytes, int]]:
    """The same of an open file; the suffix of its name tells how it is packed.

    Raises:
        DataError: packed content is damaged or ends early; a file without any bytes does.
        OSError: the file cannot be read.
    """
    if name.endswith(".zst"):
        yield from _zstandard_blocks(file, name)
    elif name.endswith(".gz"):
        yield from _stream_blocks(file, name, gzip.GzipFile(fileobj=file))
    elif name.endswith(".bz2"):
        yield from _stream_blocks(file, name, bz2.BZ2File(file))
    elif name.endswith(".xz"):
        yield from _stream_blocks(file, name, lzma.LZMAFile(file))  # noqa: SIM115 (closed in there)
    else:
        while block := file.read(BLOCK_BYTES):
            yield block, file.tell()


def _stream_blocks(
    file: IO[bytes], name: str, unpacked: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile
) -> Iterator[tuple[bytes, int]]:
    with unpacked:
        while True:
            try:
                block = unpacked.read(BLOCK_BYTES)
            except (EOFError, zlib.error, lzma.LZMAError) as fault:
                raise DataError(f"{name}: damaged or cut short ({fault}): copy it again") from fault
            except OSError as fault:
                if fault.errno is not None:  # the disk's error, not one of the content
                    raise
                raise DataError(f"{name}: damaged or cut short ({fault}): copy it again") from fault
            if not block:
                break
            yield block, file.tell()
    _require_bytes(file, name)


def _zstandard_blocks(file: IO[bytes], name: str) -> Iterator[tuple[bytes, int]]:
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
                raise DataError(f"{name}: damaged ({fault}): copy it again") from fault
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
            yield unpacked, file.tell()
    if frame is not None:
        raise DataError(f"{name}: ends within a zstd frame: it was cut short; copy it again")
    _require_bytes(file, name)


def _require_bytes(file: IO[bytes], name: str) -> None:
    """Packed content is never empty: a file without bytes is the beginning of one."""
    if file.tell() == 0:
        raise DataError(f"{name}: 0 bytes, and a packed file without content has more: it was cut short; copy it again")
