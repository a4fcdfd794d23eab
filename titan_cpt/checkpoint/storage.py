"""Checkpoint files: safetensors shards and a JSON index, as storage backend of torch.distributed.checkpoint (DCP).

DCP's planner decides which rank writes and reads which shard of which tensor, so that a checkpoint is resharded on
load. DCP's own file format is pickle, which executes code on load, and a checkpoint may come from an untrusted source
(`init = "checkpoint:PATH"`). `ShardWriter` therefore writes safetensors files, hashed while they are written, and rank
0 lists in `index.json` which file holds which shard. Any safetensors library opens the files.
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
from titan_cpt.common.weights.named_weights import loaded_name, stored_name
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
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK_BYTES = 4 << 20
new_hash = xxhash.xxh3_128  # scripts/bench/checkpoint.py replaces it to measure the cost of hashing


@dataclass(frozen=True)
class StoredShard:
    """A rectangular block of a tensor in a file: its offset in the tensor, its shape, the file's name."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str


class ShardWriter(StorageWriter):
    """Writes the shards of DCP's save plan as safetensors files, and records their sizes and checksums.

    Args:
        folder: the checkpoint's folder, which exists and is empty.
        threads: number of files that this rank writes concurrently.
    """

    def __init__(self, folder: Path, *, threads: int = 2) -> None:
        self._folder = folder
        self._threads = threads
        self.checksums: dict[str, dict[str, Any]] = {}
        """File name -> {"bytes", "xxh3_128"}, of every file that this rank wrote."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shards and fsync them."""
        shares = _even_shares(plan.items, self._threads)
        names = [f"{plan.storage_data}-{number}.safetensors" for number in range(len(shares))]
        with ThreadPoolExecutor(self._threads, thread_name_prefix="checkpoint") as threads:
            done = [threads.submit(self._write_file, *task, planner) for task in zip(names, shares, strict=True)]
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for written in done for result in written.result()])
        return future

    def _write_file(self, name: str, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        shards = [(item, _shard_of(item, name)) for item in items]
        with _HashedFile(self._folder / name) as file:
            file.write(_header(shards))
            for item, _ in shards:
                file.write(_content(planner.resolve_data(item)))  # not held while the next one is computed
        self.checksums[name] = file.checksum
        return [WriteResult(item.index, math.prod(shard.shape), shard) for item, shard in shards]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index. DCP calls this on rank 0 after every rank has written."""
        shards: dict[str, list[StoredShard]] = {}
        for rank_results in results:
            for result in rank_results:
                shards.setdefault(result.index.fqn, []).append(result.storage_data)
        tensors = {
            name: {
                "dtype": _DTYPE_NAMES[stored.properties.dtype],
                "shape": list(stored.size),
                "parts": [{"at": shard.offset, "shape": shard.shape, "file": shard.file} for shard in shards[name]],
            }
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        with _HashedFile(self._folder / INDEX) as file:
            file.write(json.dumps({"tensors": tensors}).encode())
        self.checksums[INDEX] = file.checksum

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Check that the plan holds only tensors."""
        others = [item.index.fqn for item in plan.items if item.tensor_data is None]
        assert not others, f"{others} are not tensors"
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank the prefix of its file names."""
        return [SavePlan(plan.items, f"rank-{rank:05d}", plan.planner_data) for rank, plan in enumerate(plans)]

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Not used: a writer writes one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether the ID is a path and not a URL."""
        return "://" not in str(checkpoint_id)


class ShardReader(StorageReader):
    """Reads the slices of DCP's load plan from a checkpoint's safetensors files.

    Args:
        folder: the checkpoint.
        average: read the average of the weights as the model's weights.

    Raises:
        CheckpointError: the index is damaged, or a file does not match it.
    """

    def __init__(self, folder: Path, *, average: bool = False) -> None:
        self._folder = folder
        self._average = average
        self._tensors: dict[str, dict[tuple[int, ...], StoredShard]] = {}
        self.failure: Exception | None = None
        """Why the index could not be read. DCP of torch 2.11 hides it behind an error of its own."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index as DCP metadata."""
        try:
            return self._read_metadata()
        except Exception as error:
            self.failure = error
            raise

    def _read_metadata(self) -> Metadata:
        stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for in_file, dtype, shape, shards in read_index(self._folder):
            name = loaded_name(in_file, average=self._average)
            if name is None:
                continue
            chunks = [ChunkStorageMetadata(torch.Size(shard.offset), torch.Size(shard.shape)) for shard in shards]
            stored[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
            self._tensors[name] = {shard.offset: shard for shard in shards}
        return Metadata(stored)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the slices that this rank needs, file by file."""
        wanted: dict[str, list[tuple[Any, StoredShard]]] = {}
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR, "the index lists only tensors"
            shard = self._shard(item.storage_index)
            wanted.setdefault(shard.file, []).append((item, shard))
        for name, items in wanted.items():
            with safe_open(str(self._folder / name), framework="pt") as file:
                for item, shard in items:
                    target = planner.resolve_tensor(item).detach()
                    boxes = zip(item.storage_offsets, item.lengths, strict=True)
                    box = tuple(slice(first, first + length) for first, length in boxes)
                    key = shard_key(stored_name(item.storage_index.fqn, average=self._average), shard.offset)
                    stored = file.get_slice(key)[box] if box else file.get_tensor(key)
                    if (stored.dtype, stored.shape) != (target.dtype, target.shape):
                        actual, expected = (f"{t.dtype} of {list(t.shape)}" for t in (stored, target))
                        raise CheckpointError(f"{self._folder / name}: {key} is {actual}, not {expected}")
                    target.copy_(stored)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _shard(self, index: MetadataIndex) -> StoredShard:
        assert index.offset is not None, "DCP plans reads of shards, which have an offset"
        return self._tensors[index.fqn][tuple(index.offset)]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: every rank has read the index."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to prepare."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to prepare."""
        return plans

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Not used: a reader reads one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether the ID is a path and not a URL."""
        return "://" not in str(checkpoint_id)


def read_index(folder: Path) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], list[StoredShard]]]:
    """Name, dtype, shape and shards of every tensor.

    Raises:
        CheckpointError: the index is missing or damaged, names a file outside the folder, or a tensor has gaps.
        AccessError: the system refuses to read it.
    """
    path = folder / INDEX
    try:
        tensors = json.loads(read_text(path))["tensors"].items()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; it lists which file holds which tensor") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    for name, entry in tensors:
        try:
            shape = _lengths(entry["shape"])
            shards = [
                StoredShard(_lengths(shard["at"]), _lengths(shard["shape"]), shard["file"]) for shard in entry["parts"]
            ]
            dtype = _DTYPES[entry["dtype"]]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: damaged: its entry {name!r} does not describe a tensor") from None
        for shard in shards:
            if not isinstance(shard.file, str) or Path(shard.file).name != shard.file:
                raise CheckpointError(f"{path}: names a file outside its folder: {shard.file!r}")
        if not all(_is_inside(shard, shape) for shard in shards):
            raise CheckpointError(f"{path}: damaged: a shard of {name!r} is outside the tensor")
        if sum(math.prod(shard.shape) for shard in shards) != math.prod(shape):
            raise CheckpointError(f"{path}: damaged: the shards of {name!r} do not add up to the tensor")
        yield name, dtype, shape, shards


def _is_inside(shard: StoredShard, shape: Sequence[int]) -> bool:
    if not len(shard.offset) == len(shard.shape) == len(shape):
        return False
    return all(offset + length <= full for offset, length, full in zip(shard.offset, shard.shape, shape, strict=True))


def _lengths(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise ValueError(value)
    return tuple(value)


class _HashedFile:
    """A new file, hashed while it is written and fsynced on exit; `checksum` then holds its size and hash."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._bytes = 0
        self._digest = new_hash()

    def __enter__(self) -> _HashedFile:
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Write all bytes, in blocks."""
        view = memoryview(data)
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            self._digest.update(block)  # while the block is in the CPU cache
            while block:
                block = block[os.write(self._descriptor, block) :]
        self._bytes += len(view)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        self.checksum = {"bytes": self._bytes, "xxh3_128": self._digest.hexdigest()}


def _even_shares(items: Sequence[WriteItem], count: int) -> list[list[WriteItem]]:
    """Split the items into at most `count` lists of about the same number of bytes."""
    shares: list[list[WriteItem]] = [[] for _ in range(count)]
    sizes = [0] * count
    for item in sorted(items, key=_bytes_of, reverse=True):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(item)
        sizes[smallest] += _bytes_of(item)
    return [share for share in shares if share]


def _content(tensor: Any) -> memoryview:
    assert isinstance(tensor, Tensor), "prepare_local_plan checks that the plan holds only tensors"
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _bytes_of(item: WriteItem) -> int:
    assert item.tensor_data is not None, "prepare_local_plan checks this"
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _shard_of(item: WriteItem, file: str) -> StoredShard:
    assert item.tensor_data is not None, "prepare_local_plan checks this"
    return StoredShard(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes), file)


def shard_key(name: str, offset: Sequence[int]) -> str:
    """A shard's key in its file: the tensor's name, with the shard's offset unless that is zero."""
    return f"{name}@{','.join(map(str, offset))}" if any(offset) else name


def _header(shards: Sequence[tuple[WriteItem, StoredShard]]) -> bytes:
    """The header of a safetensors file: its length in 8 bytes, then the JSON table, padded for alignment."""
    table: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for item, shard in shards:
        assert item.tensor_data is not None, "prepare_local_plan checks this"
        begin = end
        end += _bytes_of(item)
        dtype = _DTYPE_NAMES[item.tensor_data.properties.dtype]
        key = shard_key(item.index.fqn, shard.offset)
        table[key] = {"dtype": dtype, "shape": shard.shape, "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def without_dist_warning() -> Iterator[None]:
    """Suppress DCP's warning about an uninitialized process group, and unwrap its CheckpointException."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            if not error.failures:
                raise
            raise next(iter(error.failures.values()))[0] from None
