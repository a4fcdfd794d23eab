"""The files of torch's distributed checkpoint (DCP): hashed while they are written, read without running code.

DCP keeps its index (`.metadata`) and every value that is no tensor as a pickle, and by itself would unpickle anything.
A checkpoint may come from anywhere (`init = "checkpoint:PATH"`), so here an index is built of DCP's own few classes
or not at all, and values are what `weights_only` allows.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import queue
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from titan_cpt.errors import CheckpointError

_DCP = "torch.distributed.checkpoint"
_KNOWN = {
    *((f"{_DCP}.metadata", name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata")),
    *((f"{_DCP}.metadata", name) for name in ("MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", name) for name in ("TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
}
new_hash = hashlib.sha256  # scripts/bench/checkpoint.py measures what it costs by leaving it out
_BLOCK_BYTES = 1 << 20
_BLOCKS_WAITING = 16


class HashingWriter(FileSystemWriter):
    """Writes a checkpoint's files and knows their sizes and checksums when it is done.

    A thread beside each file hashes what is written, so that nothing is read a second time.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True, overwrite=False)
        self._folder, self._files = folder, HashingFiles()
        self.fs = self._files

    def checksums(self) -> dict[str, dict[str, Any]]:
        """{"bytes", "sha256"} of the files that this rank wrote, by their name in the folder."""
        return {Path(path).relative_to(self._folder).as_posix(): file for path, file in self._files.written.items()}


class HashingFiles(FileSystem):
    """DCP's way to the disk, with a record of what went there: `written` by path, {"bytes", "sha256"}."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file; what is written into it is hashed in a thread of its own."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with open(path, mode) as file:
            hashed = _Hashed(file)
            try:
                yield cast(io.IOBase, hashed)
            finally:
                self.written[str(path)] = hashed.end()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give a file another name; what is known of it goes along."""
        super().rename(path, new_path)
        if str(path) in self.written:
            self.written[str(new_path)] = self.written.pop(str(path))


class _Hashed(io.RawIOBase):
    """A file that hashes what is written into it, beside the writing."""

    def __init__(self, file: IO[Any]) -> None:
        self._file, self._bytes, self._digest = file, 0, new_hash()
        self._blocks: queue.Queue[bytes] = queue.Queue(_BLOCKS_WAITING)
        self._thread = threading.Thread(target=self._hash, name="hash", daemon=True)
        self._thread.start()
        self._gathered = bytearray()

    def write(self, data: Any) -> int:
        """Write, and hand the same bytes to the hashing thread."""
        count = self._file.write(data)
        assert count == memoryview(data).nbytes, "a buffered file takes all it is given"
        self._bytes += count
        self._gathered += data
        if len(self._gathered) >= _BLOCK_BYTES:
            self._blocks.put(bytes(self._gathered))
            self._gathered.clear()
        return count

    def tell(self) -> int:
        """How many bytes were written."""
        return self._bytes

    def flush(self) -> None:
        """Bring the bytes to the operating system."""
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        """For fsync, which comes after all that was written."""
        self._file.flush()
        return self._file.fileno()

    def end(self) -> dict[str, Any]:
        """Wait for the hash of everything."""
        if self._gathered:
            self._blocks.put(bytes(self._gathered))
        self._blocks.put(b"")
        self._thread.join()
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def _hash(self) -> None:
        while block := self._blocks.get():
            self._digest.update(block)


class SafeReader(FileSystemReader):
    """Reads a checkpoint whose index holds nothing but DCP's own classes and names no file outside the folder.

    Raises:
        CheckpointError: the index is damaged, or not what DCP writes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, unpickled with DCP's classes alone."""
        path = self._folder / ".metadata"
        try:
            with path.open("rb") as file:
                index = _IndexUnpickler(file).load()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
            raise CheckpointError(f"{path}: is not the index of a checkpoint")
        for info in index.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"{path}: names a file outside its folder: {info.relative_path!r}")
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class SafePlanner(DefaultLoadPlanner):
    """Takes values that are no tensors (betas, weight decay) without unpickling code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value into its place, after it was read with `weights_only`."""
        assert read_item.type == LoadItemType.BYTE_IO, "tensors take another way"
        safe = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _KNOWN:
            raise CheckpointError(f"holds {module}.{name}, which no index of a checkpoint needs; it is not read")
        return super().find_class(module, name)
