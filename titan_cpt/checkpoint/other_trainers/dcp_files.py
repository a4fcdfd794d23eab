"""Tensors and small objects of a DCP checkpoint (torch.distributed.checkpoint), read without executing code in it.

DCP stores each shard with `torch.save`. The shards are read one after another with `weights_only`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.other_trainers.dcp_metadata import METADATA, Entry, StoredBlock, read_metadata
from titan_cpt.checkpoint.other_trainers.torch_files import failure_text
from titan_cpt.common.reading import is_there, matching, readable
from titan_cpt.errors import AccessError, CheckpointError


class DcpFiles:
    """The files of one DCP checkpoint.

    Attributes:
        folder: the checkpoint.
        tensors: name -> entry of each tensor.
        objects: name -> entry of everything else: numbers, texts, state of data loaders.
    """

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: it is not the folder of a DCP checkpoint, or its metadata is damaged.
        """
        if not is_there(folder / METADATA):
            raise CheckpointError(f"{folder}: {_without_metadata(folder)}")
        entries = read_metadata(folder)
        self.folder = folder
        self.tensors: Mapping[str, Entry] = {name: entry for name, entry in entries.items() if entry.dtype is not None}
        self.objects: Mapping[str, Entry] = {name: entry for name, entry in entries.items() if entry.dtype is None}

    def read(self, name: str) -> Tensor:
        """A whole tensor, assembled from its shards; in memory are the tensor and one shard.

        Raises:
            CheckpointError: a file is missing or damaged, or a shard has another dtype or shape than the metadata says.
        """
        shape = self.tensors[name].shape
        return self.read_part(name, (0,) * len(shape), shape)

    def read_part(self, name: str, at: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A rectangular part of a tensor, from those shards that have some of it.

        Args:
            at: offset of the part in the tensor.
            shape: of the part.

        Raises:
            CheckpointError: as `read` does.
        """
        entry = self.tensors[name]
        assert entry.dtype is not None, "self.tensors has only tensors"
        part = torch.empty(shape, dtype=entry.dtype)
        for shard in entry.shards:
            first = [max(one, other) for one, other in zip(at, shard.at, strict=True)]
            end = [
                min(start + length, other + other_length)
                for start, length, other, other_length in zip(at, shape, shard.at, shard.shape, strict=True)
            ]
            if all(low < high for low, high in zip(first, end, strict=True)):
                stored = self._load_block(name, shard)
                into, of = (
                    tuple(slice(low - zero, high - zero) for low, high, zero in zip(first, end, start, strict=True))
                    for start in (at, shard.at)
                )
                part[into].copy_(stored[of])
        return part

    def _load_block(self, name: str, shard: StoredBlock) -> Tensor:
        entry = self.tensors[name]
        stored = self._load(shard)
        if not isinstance(stored, Tensor) or (stored.dtype, tuple(stored.shape)) != (entry.dtype, shard.shape):
            found = f"{stored.dtype} of {list(stored.shape)}" if isinstance(stored, Tensor) else type(stored).__name__
            raise CheckpointError(
                f"{self.folder / shard.file}: damaged: a part of {name} is {found}, but {METADATA} says "
                f"{entry.dtype} of {list(shard.shape)}; copy the checkpoint again"
            )
        return stored

    def read_object(self, name: str) -> Any:
        """A number, a text, or lists and dictionaries of them.

        Raises:
            CheckpointError: its file is missing or damaged, or it holds anything that `weights_only` does not load.
        """
        (shard,) = self.objects[name].shards
        return self._load(shard)

    def _load(self, shard: StoredBlock) -> Any:
        path = self.folder / shard.file
        try:
            with readable(path), path.open("rb") as file:
                if shard.first_byte + shard.bytes > path.stat().st_size:
                    raise CheckpointError(f"{path}: ends too early: it was copied or written incompletely")
                file.seek(shard.first_byte)
                content = file.read(shard.bytes)
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (CheckpointError, AccessError):
            raise
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is missing; {METADATA} names it") from None
        except Exception as error:  # a damaged file can fail in any way
            raise CheckpointError(f"{path}: cannot be read: {failure_text(error)}; copy the checkpoint again") from None


def _without_metadata(folder: Path) -> str:
    """Why a path is not a DCP checkpoint, and which ones are below it."""
    if not is_there(folder):
        return "no such folder; give the folder of one checkpoint"
    if not folder.is_dir():
        return f"is a file; give the folder of one checkpoint, with a {METADATA}"
    found = sorted({path.parent for depth in (1, 2) for path in matching(folder, *["*"] * depth, METADATA)})
    if found:
        shown = ", ".join(str(path) for path in found[-3:])
        return f"has no {METADATA}; give one of the checkpoints in it: {'..., ' if found[3:] else ''}{shown}"
    if any(folder.glob("*.safetensors")):
        return f"has no {METADATA} but safetensors: `titan-cpt import {folder} OUT`, without --from, imports these"
    return f"has no {METADATA}, so it is not a DCP checkpoint; its save may have been interrupted"
