"""Helpers of the tests of object storage: local files copied to memory:// (fsspec's dictionary in this process)."""

from pathlib import Path

import fsspec

from titan_cpt.object_storage.locations import CacheSettings


def cache_in(folder: Path, *, block_bytes: int = 4096, blocks: int = 4096) -> CacheSettings:
    """A cache in a folder, of small blocks."""
    return CacheSettings(str(folder / "cache"), blocks * block_bytes, block_bytes)


def copy_to_memory(folder: Path, bucket: str) -> str:
    """Copy all files directly in a folder; returns the URL of the copy, memory://BUCKET."""
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        if path.is_file():
            memory.pipe_file(f"/{bucket}/{path.name}", path.read_bytes())
    return f"memory://{bucket}"


class Counted:
    """Count the range reads of memory:// within a block: `ranges`, and `bytes` of them."""

    def __init__(self) -> None:
        self.ranges = 0
        self.bytes = 0

    def __enter__(self) -> "Counted":
        """Count from here."""
        kind = type(fsspec.filesystem("memory"))
        self._original = kind.cat_ranges

        def counting(system, paths, starts, ends, **options):
            self.ranges += len(paths)
            self.bytes += sum(stop - start for start, stop in zip(starts, ends, strict=True))
            return self._original(system, paths, starts, ends, **options)

        kind.cat_ranges = counting
        return self

    def __exit__(self, *_: object) -> None:
        """Stop counting."""
        type(fsspec.filesystem("memory")).cat_ranges = self._original
