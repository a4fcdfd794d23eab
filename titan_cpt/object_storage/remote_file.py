"""RemoteFile: an object read by ranges through the block cache. A change of the object is an error, never a mixture."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from titan_cpt.errors import RemoteError
from titan_cpt.object_storage.block_cache import BlockCache
from titan_cpt.object_storage.filesystem import ObjectInfo, read_ranges, stat
from titan_cpt.object_storage.locations import RemotePath

HEAD_BYTES = 65_536
_DIRECT_SHARE = 8  # read without the cache what is less than this part of its blocks
_BLOCKS_AT_ONCE = 16  # fetched concurrently and held in memory
_FORMAT = "1"  # of the cache: other versions of this code do not read its blocks


class RemoteFile:
    """An object of one length and version. Can be pickled and forked.

    Attributes:
        path: its location.
        size: length in bytes.
        version: its ETag, generation or modification time when it was opened.
    """

    def __init__(self, path: RemotePath, info: ObjectInfo | None = None) -> None:
        """Look the object up.

        Args:
            path: its location.
            info: its length and version, if they are known.

        Raises:
            RemoteError: it does not exist, no access, no answer.
        """
        self.path = path
        known = stat(path.url) if info is None else info
        self.size, self.version = known.size, known.version
        self._block_bytes = path.cache.block_bytes
        described = "\n".join((_FORMAT, path.url, str(self.size), self.version, str(self._block_bytes)))
        self._cache = BlockCache(path.cache, hashlib.sha256(described.encode()).hexdigest()[:32])

    def read(self, start: int, count: int) -> bytes:
        """Bytes [start, start + count), fewer only if the file ends before; from the cache if it has them.

        Raises:
            RemoteError: the object changed since it was opened, no access, no answer.
        """
        stop = min(start + count, self.size)
        parts = []
        while start < stop:
            number, offset = divmod(start, self._block_bytes)
            upto = min(self._block_bytes, offset + stop - start)
            data = self._cache.read(number, offset, upto)
            if data is None:
                data = self._fetch([number])[-1][offset:upto]
            parts.append(data)
            start += upto - offset
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def fetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fetch the blocks of the byte ranges [start, stop) that are not in the cache yet, several at once.

        Raises:
            RemoteError: see `read`.
        """
        missing = sorted(number for number in self._numbers(spans) if not self._cache.has(number))
        for first in range(0, len(missing), _BLOCKS_AT_ONCE):
            self._fetch(missing[first : first + _BLOCKS_AT_ONCE])

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, stop) of each range, cut at the end of the file.

        Ranges that are a small part of their blocks are read without the cache: a few bytes of many large files.

        Raises:
            RemoteError: see `read`.
        """
        cut = [(start, max(start, min(stop, self.size))) for start, stop in ranges]
        if sum(stop - start for start, stop in cut) * _DIRECT_SHARE < self._bytes_of_blocks(cut):
            found = iter(self._read_unchanged([(start, stop) for start, stop in cut if stop > start]))
            return [next(found) if stop > start else b"" for start, stop in cut]
        self.fetch(cut)
        return [self.read(start, stop - start) for start, stop in cut]

    def _numbers(self, spans: Sequence[tuple[int, int]]) -> set[int]:
        """The blocks that contain byte ranges."""
        size = self._block_bytes
        return {number for start, stop in spans for number in range(start // size, -(-min(stop, self.size) // size))}

    def _bytes_of_blocks(self, spans: Sequence[tuple[int, int]]) -> int:
        size = self._block_bytes
        return sum(min(size, self.size - number * size) for number in self._numbers(spans))

    def _fetch(self, numbers: Sequence[int]) -> list[bytes]:
        """Read whole blocks and store them in the cache."""
        size = self._block_bytes
        blocks = self._read_unchanged([(number * size, min((number + 1) * size, self.size)) for number in numbers])
        for number, block in zip(numbers, blocks, strict=True):
            self._cache.write(number, block)
        return blocks

    def _read_unchanged(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges, and discard them if the object is not the one that was opened."""
        data = read_ranges(self.path.url, ranges)
        now = stat(self.path.url)
        if (now.size, now.version) != (self.size, self.version):
            raise RemoteError(
                f"{self.path}: the object was replaced since this run opened it ({self.size} bytes, version "
                f"{self.version}; now {now.size} bytes, version {now.version}). Nothing of the new one was used: "
                "restore it and start again; checkpoints are intact"
            )
        return data


def read_remote_head(path: RemotePath) -> bytes:
    """The first 64 KiB of an object, without the cache."""
    file = RemoteFile(path)
    return _head(file.path, ObjectInfo(file.size, file.version))


@lru_cache(maxsize=4096)
def _head(path: RemotePath, info: ObjectInfo) -> bytes:
    return RemoteFile(path, info).read_ranges([(0, HEAD_BYTES)])[0]
