"""The packing index: which pieces of documents each packed sequence consists of, in a file that is read by sequence.

Layout, little-endian: segments, then a footer (JSON), then its length as u64, the XXH3 of footer and length as u64, and
the magic bytes. A segment of S sequences and P pieces (pieces.py) is

    P u64 pieces | S + 1 u32 number of the first piece of each sequence | S u32 targets of each | 4 zero bytes

The footer has the version, seq_len, the digest of the document borders, the counts, the segments and the XXH3 of them.
It is at the end because the numbers of sequences are known only there: documents are read once.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from titan_cpt.data.packing.pieces import PackingCounts, Piece, Segment, decode
from titan_cpt.errors import DataError

VERSION = 1  # increase it when the packing of the same documents, or the layout, changes
MAGIC = b"TCPTPACK"
_TRAILER_BYTES = 24
_PADDING = bytes(4)  # the next segment begins at a multiple of 8 bytes
_LARGEST_FOOTER_BYTES = 1 << 26
_CHECKED_BYTES = 1 << 26  # of a file that is compared with its checksum, read at a time


class DamagedIndexError(DataError):
    """An index is truncated, damaged, of another version, or of other documents; it is built again."""


def write_index(
    file: IO[bytes], segments: Iterable[tuple[Segment, PackingCounts]], *, seq_len: int, borders: str
) -> PackingCounts:
    """Write an index, segment by segment.

    Args:
        file: an empty file.
        segments: of `packed_segments`.
        seq_len: tokens of a sequence.
        borders: digest of the document borders.
    """
    counts = PackingCounts()
    sizes = []
    digest = xxhash.xxh3_64()
    for segment, counted in segments:
        for array, dtype in zip(segment, ("<u8", "<u4", "<u4"), strict=True):
            data = np.ascontiguousarray(array, dtype).data
            file.write(data)
            digest.update(data)
        file.write(_PADDING)
        digest.update(_PADDING)
        sizes.append([len(segment.targets), len(segment.pieces)])
        counts += counted
    footer = json.dumps(
        {
            "version": VERSION,
            "seq_len": seq_len,
            "borders": borders,
            "counts": asdict(counts),
            "segments": sizes,
            "checksum": digest.hexdigest(),
        }
    ).encode()
    footer += len(footer).to_bytes(8, "little")
    file.write(footer + xxhash.xxh3_64(footer).intdigest().to_bytes(8, "little") + MAGIC)
    return counts


class PackingIndex:
    """An index, open for reading through a memory map. Can be pickled and forked.

    Only this package writes the file, under another name that it renames, so no process truncates it while it is read.

    Attributes:
        path: the file.
        seq_len: tokens of a sequence.
        counts: how the documents fill sequences.
    """

    def __init__(self, path: Path, *, seq_len: int, borders: str, check_content: bool) -> None:
        """Open and check an index.

        Args:
            path: the file.
            seq_len: tokens of a sequence.
            borders: digest of the document borders that it must be of.
            check_content: compare the whole content with its checksum, not only footer and length.

        Raises:
            DamagedIndexError: it is not the index of these documents, or damaged.
            OSError: it cannot be read.
        """
        self.path = path
        self.seq_len = seq_len
        footer, content_bytes = _read_footer(path)
        expected = {"version": VERSION, "seq_len": seq_len, "borders": borders}
        found = {key: footer.get(key) for key in expected}
        if found != expected:
            raise DamagedIndexError(f"{path}: is the index of other documents, or of another version")
        self.counts = PackingCounts(**footer["counts"])
        self._sequences = [sequences for sequences, _ in footer["segments"]]
        self._pieces = [pieces for _, pieces in footer["segments"]]
        self._first = [0, *accumulate(self._sequences)]
        self._offsets = [0, *accumulate(8 * p + 8 * (s + 1) for s, p in footer["segments"])]
        if self._first[-1] != self.counts.sequences or content_bytes != self._offsets[-1]:
            raise DamagedIndexError(f"{path}: is truncated")
        self._map: NDArray[np.uint8] | None = None
        if check_content and _checksum(path, content_bytes) != footer["checksum"]:
            raise DamagedIndexError(f"{path}: its content does not have the checksum that it was written with")

    def pieces(self, sequence: int) -> list[Piece]:
        """Return the pieces of a sequence, in the order of the token stream.

        Raises:
            IndexError: there is no such sequence.
        """
        if not 0 <= sequence < self.counts.sequences:
            raise IndexError(f"{self.path}: sequence {sequence} of {self.counts.sequences}")
        segment = bisect_right(self._first, sequence) - 1
        stored = self._segment(segment)
        within = sequence - self._first[segment]
        begin, end = stored.starts[within : within + 2].tolist()
        return decode(stored.pieces[begin:end], self.seq_len)

    def targets(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of positions that have a target, of each of these sequences, int64 [n]."""
        counted = np.empty(len(sequences), np.int64)
        segments = np.searchsorted(self._first, sequences, side="right") - 1
        for segment in np.unique(segments).tolist():
            chosen = segments == segment
            counted[chosen] = self._segment(segment).targets[sequences[chosen] - self._first[segment]]
        return counted

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything except the memory map, which would be copied."""
        return {**self.__dict__, "_map": None}

    def _segment(self, number: int) -> Segment:
        if self._map is None:
            self._map = np.memmap(self.path, np.uint8, mode="r")
        sequences, pieces = self._sequences[number], self._pieces[number]
        offset = self._offsets[number]
        starts = offset + 8 * pieces
        targets = starts + 4 * (sequences + 1)
        return Segment(
            self._map[offset:starts].view("<u8"),
            self._map[starts:targets].view("<u4"),
            self._map[targets : targets + 4 * sequences].view("<u4"),
        )


def _read_footer(path: Path) -> tuple[dict[str, Any], int]:
    """Read and check the footer; returns it and the length of the content before it, in bytes.

    Raises:
        DamagedIndexError: the file does not end with one.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _TRAILER_BYTES))
        trailer = file.read(_TRAILER_BYTES)
        length, checksum = (int.from_bytes(trailer[start : start + 8], "little") for start in (0, 8))
        if trailer[16:] != MAGIC or not 0 < length <= min(size - _TRAILER_BYTES, _LARGEST_FOOTER_BYTES):
            raise DamagedIndexError(f"{path}: is truncated or not a packing index")
        file.seek(size - _TRAILER_BYTES - length)
        footer = file.read(length)
    if xxhash.xxh3_64(footer + trailer[:8]).intdigest() != checksum:
        raise DamagedIndexError(f"{path}: its footer does not have the checksum that it was written with")
    content: dict[str, Any] = json.loads(footer)
    return content, size - _TRAILER_BYTES - length


def _checksum(path: Path, size_bytes: int) -> str:
    """XXH3 of the first bytes of a file, hexadecimal."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while size_bytes:
            block = file.read(min(_CHECKED_BYTES, size_bytes))
            if not block:
                break
            digest.update(block)
            size_bytes -= len(block)
    return digest.hexdigest()
