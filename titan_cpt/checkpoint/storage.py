"""The files of a checkpoint: safetensors and an index in JSON. No code is in them, and none is ever run.

torch's distributed checkpoint (DCP) plans which rank writes and reads which part of which tensor. Its own files are
pickles, which run whatever they hold, and a checkpoint may come from anywhere (`init = "checkpoint:PATH"`). So its
plans are carried out here: each rank writes a few safetensors files, hashed on the way, and rank 0 lists in
`index.json` which file holds which part. Any safetensors reader opens them.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from titan_cpt.common.reading import read_text
from titan_cpt.errors import CheckpointError

INDEX = "index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK_BYTES = 4 << 20
new_hash = xxhash.xxh3_128  # scripts/bench/checkpoint.py measures what it costs by leaving it out


@dataclass(frozen=True)
class _Part:
    """A box of a tensor in a file: where it begins in the tensor, its lengths, the file's name."""

    at: tuple[int, ...]
    shape: tuple[int, ...]
    file: str


class ShardWriter(StorageWriter):
    """Carries out DCP's plan of a save; knows the sizes and checksums of this rank's files when it is done.

    Args:
        folder: empty, and there.
        threads: files that this rank writes at a time, one thread each.
    """

    def __init__(self, folder: Path, *, threads: int = 2) -> None:
        self._folder, self._threads = folder, threads
        self.checksums: dict[str, dict[str, Any]] = {}
        """{"bytes", "xxh3_128"} of every file that this rank wrote, by name."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's parts and bring them to the disk."""
        shares = _even_shares(plan.items, self._threads)
        names = [f"{plan.storage_data}-{number}.safetensors" for number in range(len(shares))]
        with ThreadPoolExecutor(self._threads, thread_name_prefix="checkpoint") as threads:
            done = [threads.submit(self._write_file, *task, planner) for task in zip(names, shares, strict=True)]
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for written in done for result in written.result()])
        return future

    def _write_file(self, name: str, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        parts = [(item, _part(item, name)) for item in items]
        with _HashedFile(self._folder / name) as file:
            file.write(_header(parts))
            for item, _ in parts:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor), f"{item.index.fqn} is a tensor"
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.checksums[name] = file.checksum
        return [WriteResult(item.index, math.prod(part.shape), part) for item, part in parts]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index; on rank 0, when every rank has written."""
        parts: dict[str, list[_Part]] = {}
        for result in (one for of_rank in results for one in of_rank):
            parts.setdefault(result.index.fqn, []).append(result.storage_data)
        tensors = {
            name: {
                "dtype": _NAMES[stored.properties.dtype],
                "shape": list(stored.size),
                "parts": [{"at": part.at, "shape": part.shape, "file": part.file} for part in parts[name]],
            }
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        with _HashedFile(self._folder / INDEX) as file:
            file.write(json.dumps({"tensors": tensors}).encode())
        self.checksums[INDEX] = file.checksum

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to prepare; tensors are all there is to save."""
        others = [item.index.fqn for item in plan.items if item.tensor_data is None]
        assert not others, f"{others} are no tensors"
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank the beginning of its files' names."""
        return [SavePlan(plan.items, f"rank-{rank:05d}", plan.planner_data) for rank, plan in enumerate(plans)]

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer writes one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a folder's name."""
        return "://" not in str(checkpoint_id)


class ShardReader(StorageReader):
    """Carries out DCP's plan of a load.

    Raises:
        CheckpointError: the index is damaged, or a file does not hold what it says.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, dict[tuple[int, ...], _Part]] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as DCP wants it."""
        stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, dtype, shape, parts in read_index(self._folder):
            chunks = [ChunkStorageMetadata(torch.Size(part.at), torch.Size(part.shape)) for part in parts]
            stored[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
            self._tensors[name] = {part.at: part for part in parts}
        return Metadata(stored)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the boxes that this rank wants, each from the file that holds it."""
        wanted: dict[str, list[tuple[Any, _Part]]] = {}
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR, "the index lists tensors alone"
            part = self._part(item.storage_index)
            wanted.setdefault(part.file, []).append((item, part))
        for name, items in wanted.items():
            with safe_open(str(self._folder / name), framework="pt") as file:
                for item, part in items:
                    target = planner.resolve_tensor(item).detach()
                    boxes = zip(item.storage_offsets, item.lengths, strict=True)
                    box = tuple(slice(first, first + length) for first, length in boxes)
                    key = _key(item.storage_index.fqn, part.at)
                    found = file.get_slice(key)[box] if box else file.get_tensor(key)
                    if (found.dtype, found.shape) != (target.dtype, target.shape):
                        is_one, wanted_one = (f"{t.dtype} of {list(t.shape)}" for t in (found, target))
                        raise CheckpointError(f"{self._folder / name}: {key} is {is_one}, not {wanted_one}")
                    target.copy_(found)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _part(self, index: MetadataIndex) -> _Part:
        assert index.offset is not None, "DCP asks for parts"
        return self._tensors[index.fqn][tuple(index.offset)]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The plan is made on every rank from the index that it read; DCP hands it out where it was not."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to prepare."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to prepare."""
        return plans

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader reads one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a folder's name."""
        return "://" not in str(checkpoint_id)


def read_index(folder: Path) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], list[_Part]]]:
    """Name, dtype, shape and parts of every tensor.

    Raises:
        CheckpointError: the index is missing or damaged, names a file outside the folder, or a tensor has gaps.
        AccessError: the system does not let it be read.
    """
    path = folder / INDEX
    try:
        tensors = json.loads(read_text(path))["tensors"].items()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; it says which file holds which tensor") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    for name, told in tensors:
        try:
            shape = _lengths(told["shape"])
            parts = [_Part(_lengths(part["at"]), _lengths(part["shape"]), part["file"]) for part in told["parts"]]
            dtype = _DTYPES[told["dtype"]]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: damaged: what it says of {name!r} is not of a tensor") from None
        for part in parts:
            if not isinstance(part.file, str) or Path(part.file).name != part.file:
                raise CheckpointError(f"{path}: names a file outside its folder: {part.file!r}")
        if not all(_lies_in(part, shape) for part in parts):
            raise CheckpointError(f"{path}: damaged: a part of {name!r} lies outside it")
        if sum(math.prod(part.shape) for part in parts) != math.prod(shape):
            raise CheckpointError(f"{path}: damaged: the parts of {name!r} are not the whole of it")
        yield name, dtype, shape, parts


def _lies_in(part: _Part, shape: Sequence[int]) -> bool:
    if not len(part.at) == len(part.shape) == len(shape):
        return False
    return all(at + length <= whole for at, length, whole in zip(part.at, part.shape, shape, strict=True))


def _lengths(told: Any) -> tuple[int, ...]:
    if not isinstance(told, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in told):
        raise ValueError(told)
    return tuple(told)


class _HashedFile:
    """A new file, hashed as it is written, on the disk when it is closed; `checksum` then tells of it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._bytes, self._digest = 0, new_hash()

    def __enter__(self) -> _HashedFile:
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Write all of it."""
        whole = memoryview(data)
        for start in range(0, len(whole), _BLOCK_BYTES):
            block = whole[start : start + _BLOCK_BYTES]
            self._digest.update(block)  # while it is in the cache, or about to be
            while block:
                block = block[os.write(self._descriptor, block) :]
        self._bytes += len(whole)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        self.checksum = {"bytes": self._bytes, "xxh3_128": self._digest.hexdigest()}


def _even_shares(items: Sequence[WriteItem], count: int) -> list[list[WriteItem]]:
    """The items in so many lists, or fewer, of about the same number of bytes."""
    shares: list[list[WriteItem]] = [[] for _ in range(count)]
    sizes = [0] * count
    for item in sorted(items, key=_bytes_of, reverse=True):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(item)
        sizes[smallest] += _bytes_of(item)
    return [share for share in shares if share]


def _bytes_of(item: WriteItem) -> int:
    assert item.tensor_data is not None, "prepare_local_plan has seen to it"
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _part(item: WriteItem, file: str) -> _Part:
    assert item.tensor_data is not None, "prepare_local_plan has seen to it"
    return _Part(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes), file)


def _key(name: str, at: Sequence[int]) -> str:
    """A part's name in its file: the tensor's, and where the part begins unless that is the tensor's beginning."""
    return f"{name}@{','.join(map(str, at))}" if any(at) else name


def _header(parts: Sequence[tuple[WriteItem, _Part]]) -> bytes:
    """The beginning of a safetensors file: the length of the table, and the table, padded for alignment."""
    table: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for item, part in parts:
        assert item.tensor_data is not None, "prepare_local_plan has seen to it"
        begin, end = end, end + _bytes_of(item)
        dtype = _NAMES[item.tensor_data.properties.dtype]
        table[_key(item.index.fqn, part.at)] = {"dtype": dtype, "shape": part.shape, "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def without_dist_warning() -> Iterator[None]:
    """For DCP in a process without peers: no warning that there are none, and errors without DCP's wrapping."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            if not error.failures:
                raise
            raise next(iter(error.failures.values()))[0] from None
