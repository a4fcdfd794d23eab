"""Read DCP's .metadata, a pickle, without executing what it names: every class in it becomes a plain record.

DCP (torch.distributed.checkpoint) describes a checkpoint in this file: the shape and dtype of every tensor, and where
its shards are. An unpickler calls whatever a pickle names, so this one knows the names below and refuses all others;
and what it builds for them are records of its own, not the classes that the file names.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titan_cpt.common.reading import readable
from titan_cpt.errors import CheckpointError

METADATA = ".metadata"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "olmo_core.distributed.checkpoint.filesystem": {"_StorageInfo"},  # with the same fields
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_get_layout"},
    "torch": {"device"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}
"""Module -> names that become plain records."""


@dataclass(frozen=True)
class StoredBlock:
    """A rectangular block of a tensor, or a whole object: where its bytes are.

    Attributes:
        at: the block's offset in the tensor; () for an object.
        shape: the block's shape; () for an object.
        file: name of the file in the checkpoint's folder.
        first_byte: position in the file.
        bytes: length in the file.
    """

    at: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    first_byte: int
    bytes: int


@dataclass(frozen=True)
class Entry:
    """A tensor, or an object (dtype None), and its shards."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    shards: tuple[StoredBlock, ...]


def read_metadata(folder: Path) -> dict[str, Entry]:
    """Name of every tensor and object of a DCP checkpoint -> its entry.

    Raises:
        CheckpointError: .metadata is missing, damaged, names anything that DCP does not write there, or a file outside
            of the folder; or the shards of a tensor do not add up to it.
    """
    path = folder / METADATA
    try:
        with readable(path):
            content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; DCP lists there which file holds which tensor") from None
    except ValueError as error:
        raise CheckpointError(f"{error}; it must be a file that DCP wrote") from None
    try:
        root = _Unpickler(io.BytesIO(content)).load()
        return dict(_entries(root, path))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{path}: cannot be read: {reason}; copy the checkpoint again") from None


class _Unpickler(pickle.Unpickler):
    """An unpickler that imports nothing and calls nothing except records, `tuple` and `OrderedDict`'s stand-in, dict.

    The classes of the records are made for each file, so that a file that changes them changes no other.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._classes: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a class that DCP writes."""
        if name in _RECORDS.get(module, ()):
            return self._classes.setdefault((module, name), type(name, (_Record,), {}))
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise CheckpointError(
            f"it names {module}.{name}, which is not part of DCP's metadata. Nothing in it was executed; do not trust "
            "this checkpoint unless you know why it is there"
        )

    def load(self) -> Any:
        """Unpickle the file; the message of a refusal names no path, which `read_metadata` adds."""
        try:
            return super().load()
        except CheckpointError as error:
            raise ValueError(str(error)) from None


class _Record:
    """An object of any class in the file: its fields as attributes, and the arguments that it was made with."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def _entries(root: Any, path: Path) -> Iterator[tuple[str, Entry]]:
    """The entries of the unpickled metadata, checked."""
    storage: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
    for index, info in root.storage_data.items():
        storage.setdefault(index.fqn, []).append((_lengths(getattr(index, "offset", None) or ()), info))
    for name, stored in root.state_dict_metadata.items():
        where = storage.get(name, [])
        if not isinstance(name, str):
            raise ValueError(f"the name {name!r} is not a text")
        if type(stored).__name__ == "BytesStorageMetadata":
            if len(where) != 1:
                raise ValueError(f"the object {name!r} is in {len(where)} places")
            yield name, Entry(None, (), (_shard((), (), where[0][1]),))
        else:
            yield name, _tensor_entry(name, stored, dict(where), path)


def _tensor_entry(name: str, stored: Any, where: Mapping[tuple[int, ...], Any], path: Path) -> Entry:
    shape = _lengths(stored.size)
    dtype = _dtype_of(stored.properties)
    chunks = list({(_lengths(chunk.offsets), _lengths(chunk.sizes)): None for chunk in stored.chunks})
    absent = [at for at, _ in chunks if at not in where]
    if absent:
        raise ValueError(f"no file is named for the part of {name!r} at {list(absent[0])}")
    for at, lengths in chunks:
        ends = [first + length for first, length in zip(at, lengths, strict=True)]
        if len(at) != len(shape) or any(end > full for end, full in zip(ends, shape, strict=True)):
            raise ValueError(f"a part of {name!r} is outside of the tensor")
    if len({at for at, _ in chunks}) != len(chunks):
        raise ValueError(f"a part of {name!r} is listed twice")
    if sum(math.prod(lengths) for _, lengths in chunks) != math.prod(shape):
        raise ValueError(f"the parts of {name!r} do not add up to the tensor: the checkpoint is incomplete")
    _require_no_overlap(name, chunks)
    shards = tuple(_shard(at, lengths, where[at]) for at, lengths in chunks)
    for shard in shards:  # or a few bytes claim a tensor that fills the memory
        if shard.bytes < math.prod(shard.shape) * dtype.itemsize:
            raise ValueError(f"a part of {name!r} of shape {list(shard.shape)} is in only {shard.bytes:,} bytes")
    return Entry(dtype, shape, shards)


def _require_no_overlap(name: str, chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Parts that have all of a tensor's elements and do not overlap leave no gap, whose values nobody wrote."""
    boxes = sorted((at, lengths) for at, lengths in chunks if all(lengths))
    for number, (at, lengths) in enumerate(boxes):
        for other, other_lengths in boxes[number + 1 :]:
            if other and other[0] >= at[0] + lengths[0]:
                break  # those that follow begin even later
            pairs = zip(at, lengths, other, other_lengths, strict=True)
            if all(a < b + other_length and b < a + length for a, length, b, other_length in pairs):
                raise ValueError(f"two parts of {name!r} overlap")


def _dtype_of(properties: Any) -> torch.dtype:
    """The dtype of TensorProperties, which DCP pickles as a tuple that begins with it, or as fields."""
    dtype = properties.state[0] if hasattr(properties, "state") else properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a dtype is {dtype!r}")
    return dtype


def _shard(at: tuple[int, ...], shape: tuple[int, ...], info: Any) -> StoredBlock:
    file = info.relative_path
    if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
        raise ValueError(f"it names a file outside of its folder: {file!r}")
    if getattr(info, "transform_descriptors", None):
        raise ValueError(
            f"{file} is written with {info.transform_descriptors} (compression or encryption), which cannot be read "
            "here: save it without"
        )
    first, length = _lengths((info.offset, info.length))
    return StoredBlock(at, shape, file, first, length)


def _lengths(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise ValueError(f"{value!r} are not lengths")
    return value
