"""A local cache of blocks of remote files, shared by all processes of a machine, of bounded size.

<folder>/<object>/<block number>, where <object> is a digest of URL, length and version: blocks of a replaced object are
never read. A block file is its content followed by the content's checksum. It is written under a temporary name and
renamed, so readers see whole blocks; a block that a power failure damaged has a wrong checksum and is fetched again.
Processes do not wait for each other: two may fetch the same block, and a block may vanish between two reads.

The least recently used blocks are removed first. A process checks the size of the folder after it has added a sixteenth
of the limit, so the cache may exceed the limit by about that much for each process.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import xxhash

from titan_cpt.common.file_lock import FileLock
from titan_cpt.errors import AccessError
from titan_cpt.object_storage.locations import CacheSettings

_CHECKSUM_BYTES = 8
_TOUCH_SECONDS = 60.0  # a block's time of use is written at most this often by one process
_OLD_SECONDS = 3600.0  # temporary files of this age belong to killed processes
_LOCK_FILE = ".lock"
PACKING_FOLDER = "packing"
"""A folder beside those of the objects: packing indices (data/packing/), which are no blocks and are not removed."""


class BlockCache:
    """The blocks of one object. Can be pickled and forked.

    Args:
        settings: folder, limit and block size.
        key: digest that names the object and its version.
    """

    def __init__(self, settings: CacheSettings, key: str) -> None:
        self._settings = settings
        self._folder = Path(settings.folder).expanduser() / key
        self._checked: dict[int, float] = {}  # block number -> time at which this process last marked it as used
        self._added_bytes = 0
        self._last: tuple[int, bytes] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Pickle everything except the block in memory."""
        return {**self.__dict__, "_last": None}

    def read(self, number: int, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of a block; None if it is not in the cache."""
        last = self._last  # once: a prefetching thread replaces it
        if last is not None and last[0] == number:
            return last[1][start:stop]
        path = self._path(number)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            if number not in self._checked and not self._is_whole(descriptor):
                with suppress(OSError):
                    path.unlink()
                return None
            data = os.pread(descriptor, stop - start, start)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        self._mark_used(number, path)
        return data if len(data) == stop - start else None

    def has(self, number: int) -> bool:
        """Whether a block is stored; its content is not checked."""
        last = self._last
        return (last is not None and last[0] == number) or self._path(number).exists()

    def write(self, number: int, content: bytes) -> None:
        """Store a block, and remove old ones beyond the limit. A full or read-only disk is reported once."""
        self._last = (number, content)
        path = self._path(number)
        temporary = path.with_name(f".{number}.{os.getpid()}-{time.monotonic_ns()}.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(content)
                    file.write(xxhash.xxh3_64(content).digest())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            _warn_once(self._settings.folder, error)
            return
        self._checked[number] = time.monotonic()
        self._added_bytes += len(content)
        if self._added_bytes >= self._settings.limit_bytes // 16:
            self._added_bytes = 0
            remove_old_blocks(self._settings)

    def _path(self, number: int) -> Path:
        return self._folder / str(number)

    def _is_whole(self, descriptor: int) -> bool:
        size = os.fstat(descriptor).st_size - _CHECKSUM_BYTES
        content = os.pread(descriptor, size, 0) if size > 0 else b""
        checksum = os.pread(descriptor, _CHECKSUM_BYTES, size) if size > 0 else b""
        return bool(content) and xxhash.xxh3_64(content).digest() == checksum

    def _mark_used(self, number: int, path: Path) -> None:
        now = time.monotonic()
        if now - self._checked.get(number, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._checked[number] = now
            with suppress(OSError):
                os.utime(path)


def remove_old_blocks(settings: CacheSettings) -> None:
    """Remove the least recently used blocks until the cache is below nine tenths of its limit, if it exceeds the limit.

    One process at a time does this; others return at once.
    """
    folder = Path(settings.folder).expanduser()
    try:
        lock = FileLock(folder / _LOCK_FILE, warn=lambda message: None)
    except OSError:
        return
    try:
        if not lock.acquire():
            return
        blocks = sorted(_stored_blocks(folder))
        total = sum(size for _, size, _ in blocks)
        if total > settings.limit_bytes:
            for _, size, path in blocks:
                with suppress(OSError):
                    os.unlink(path)
                total -= size
                if total <= settings.limit_bytes * 9 // 10:
                    break
        lock.release()
    except (AccessError, OSError):
        return
    finally:
        lock.close()


def _stored_blocks(folder: Path) -> list[tuple[float, int, str]]:
    """(time of last use, bytes, path) of every block; temporary files of killed processes and empty folders go."""
    found = []
    now = time.time()
    for entry in list(os.scandir(folder)):
        if entry.name == PACKING_FOLDER or not entry.is_dir(follow_symlinks=False):
            continue
        blocks = list(os.scandir(entry.path))
        for block in blocks:
            with suppress(OSError):
                status = block.stat(follow_symlinks=False)
                if not block.name.endswith(".tmp"):
                    found.append((status.st_mtime, status.st_size, block.path))
                elif now - status.st_mtime > _OLD_SECONDS:
                    os.unlink(block.path)
        if not blocks:
            with suppress(OSError):
                os.rmdir(entry.path)
    return found


_warned: set[str] = set()


def _warn_once(folder: str, error: OSError) -> None:
    if folder not in _warned:
        _warned.add(folder)
        print(
            f"warning: {folder}: the cache of remote files cannot be written ({error.strerror}), so blocks are fetched "
            "again whenever they are needed. Free space there, or set storage.cache_dir to another folder",
            file=sys.stderr,
            flush=True,
        )
