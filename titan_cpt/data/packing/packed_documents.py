"""PackedDocuments: the documents of a source with packing = "best_fit", and their packing indices in the cache.

An index is built once per machine: <cache_dir>/packing/<key>.pack, where the key is a digest of the document borders
and the sequence length, so any run that packs the same documents finds it. One process builds it under a lock; the
others wait. An index has about 8 bytes per document and 8 per sequence. Building one removes those that no run has
opened for 90 days.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from titan_cpt.common.file_lock import FileLock
from titan_cpt.common.files import atomic_file, make_folder, remove_unfinished
from titan_cpt.data.formats.token_files import TokenFiles
from titan_cpt.data.packing.document_lengths import borders_digest, document_lengths
from titan_cpt.data.packing.index_file import VERSION, DamagedIndexError, PackingIndex, write_index
from titan_cpt.data.packing.pieces import PackingCounts, count_packing, packed_segments
from titan_cpt.errors import AccessError, reason_and_remedy
from titan_cpt.object_storage.block_cache import PACKING_FOLDER
from titan_cpt.object_storage.locations import Location

_UNUSED_SECONDS = 90 * 86_400.0  # after which an index that no run has opened is removed
_WAIT_SECONDS = 0.2  # between two attempts to take the lock
_counted: dict[tuple[str, int], PackingCounts] = {}  # by borders and seq_len: a sweep plans many runs on the same data


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of a source, in token files that exist.

    Attributes:
        where: dotted config key of the files, for messages.
        files: the files as the config describes them.
        paths: the result of `resolve_paths(files)`.
        eod_id: the end-of-document id.
    """

    where: str
    files: TokenFiles
    paths: Sequence[Location]
    eod_id: int

    @cached_property
    def borders(self) -> str:
        """A digest of the document borders; see `borders_digest`."""
        return borders_digest(self.files, self.paths, self.eod_id)

    def counts(self, seq_len: int, *, log: Callable[[str], None]) -> PackingCounts:
        """Count the packed sequences, from the cached index or from the lengths of the documents.

        Raw files have to be read to find the documents; then the index is built at once.

        Raises:
            DataError: a file is damaged.
            AccessError: the index of raw files cannot be written.
        """
        with suppress(OSError, DamagedIndexError):
            return self._open(seq_len, check_content=False).counts
        if self.files.format == "raw":
            return self.index(seq_len, log=log).counts
        if (self.borders, seq_len) not in _counted:
            lengths = document_lengths(self.files, self.paths, self.eod_id)
            _counted[self.borders, seq_len] = count_packing(lengths, seq_len)
        return _counted[self.borders, seq_len]

    def index(self, seq_len: int, *, log: Callable[[str], None]) -> PackingIndex:
        """Open the index; build it first if it is missing, damaged, or of other documents.

        Args:
            seq_len: tokens of a sequence.
            log: prints a line for the user.

        Raises:
            DataError: a token file is damaged.
            AccessError: the index cannot be written.
        """
        path = self._path(seq_len)
        with suppress(OSError, DamagedIndexError):
            index = self._open(seq_len, check_content=True)
            _mark_used(path)
            return index
        try:
            make_folder(path.parent)
            with _locked(path.with_suffix(".lock"), self.where, log):
                try:
                    return self._open(seq_len, check_content=True)  # another process has built it meanwhile
                except FileNotFoundError:
                    pass
                except DamagedIndexError as error:
                    log(f"{self.where}: {error}: it is built again")
                self._build(path, seq_len, log)
                return self._open(seq_len, check_content=False)
        except OSError as error:
            raise AccessError(
                f"{self.where}: its packing index {path} cannot be written: {reason_and_remedy(error)}, by setting "
                "storage.cache_dir"
            ) from None

    def _build(self, path: Path, seq_len: int, log: Callable[[str], None]) -> None:
        began = time.monotonic()
        log(f"{self.where}: packs documents into sequences of {seq_len} tokens; the index is kept as {path}")
        remove_unfinished(path)
        _remove_unused(path.parent)
        with atomic_file(path) as file:
            lengths = document_lengths(self.files, self.paths, self.eod_id)
            counts = write_index(file, packed_segments(lengths, seq_len), seq_len=seq_len, borders=self.borders)
        log(
            f"{self.where}: {counts.documents:,} documents in {counts.sequences:,} sequences, "
            f"{counts.fill(seq_len):.2%} full, {counts.cut_documents:,} documents cut; "
            f"{time.monotonic() - began:.1f} s"
        )

    def _open(self, seq_len: int, *, check_content: bool) -> PackingIndex:
        return PackingIndex(self._path(seq_len), seq_len=seq_len, borders=self.borders, check_content=check_content)

    def _path(self, seq_len: int) -> Path:
        assert self.files.cache is not None, "the config has a cache folder"
        key = hashlib.sha256(f"{VERSION} {seq_len} {self.borders}".encode()).hexdigest()[:32]
        return Path(self.files.cache.folder).expanduser() / PACKING_FOLDER / f"{key}.pack"


def _mark_used(path: Path) -> None:
    with suppress(OSError):  # another user's cache may be read-only
        os.utime(path)


def _remove_unused(folder: Path) -> None:
    """Remove the indices that no run has opened for a long time: of other data, or of other sequence lengths."""
    for path in folder.glob("*.pack"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _UNUSED_SECONDS:
                path.unlink()


@contextmanager
def _locked(path: Path, where: str, log: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock during the block; wait for the process that has it."""
    lock = FileLock(path, warn=lambda message: None)  # without locks, each process writes the same file
    try:
        said = False
        while not lock.acquire():
            if not said and (holder := lock.holder()):
                log(f"{where}: waits for its packing index, which {holder} builds")
                said = True
            time.sleep(_WAIT_SECONDS)
        try:
            yield
        finally:
            lock.release()
    finally:
        lock.close()
