"""Rows of single weights of a checkpoint, read without torch.distributed.checkpoint's load plans."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_cpt.checkpoint.hf_release import weight_shapes
from titan_cpt.checkpoint.storage import StoredShard, read_index, shard_key
from titan_cpt.common.text import problem_list
from titan_cpt.common.weights.named_weights import MODEL
from titan_cpt.errors import CheckpointError
from titan_cpt.models.spec import ModelSpec


class StoredWeights:
    """The weights in the files of a checkpoint, whatever parallelism degrees they were saved under.

    Args:
        folder: a verified checkpoint.
        spec: its model.
        part: `MODEL`, or `AVERAGE` for the average of the weights.

    Raises:
        CheckpointError: the index is damaged, or does not list the weights of the model.
    """

    def __init__(self, folder: Path, spec: ModelSpec, part: str = MODEL) -> None:
        self._folder = folder
        self._shards: dict[str, list[StoredShard]] = {}
        self._prefix = f"{part}."
        shapes: dict[str, tuple[int, ...]] = {}
        for name, _, shape, shards in read_index(folder):
            if name.startswith(self._prefix):
                weight = name.removeprefix(self._prefix)
                shapes[weight], self._shards[weight] = shape, shards
        expected = weight_shapes(spec)
        faults = [
            f"{self._prefix}{name}: {list(shapes[name]) if name in shapes else 'missing'}, the model has "
            f"{list(expected[name]) if name in expected else 'no such weight'}"
            for name in sorted({*expected, *shapes})
            if shapes.get(name) != expected.get(name)
        ]
        if faults:
            raise CheckpointError(f"{folder}: its weights do not fit its manifest: {problem_list(faults)}")
        self._shapes = shapes

    def read(self, name: str, rows: slice) -> Tensor:
        """Rows of a weight, in the dtype of the files.

        Raises:
            CheckpointError: a file can no longer be read.
        """
        first, last, _ = rows.indices(self._shapes[name][0])
        found: list[tuple[tuple[slice, ...], Tensor]] = []
        for shard in self._shards[name]:
            begin = max(first, shard.offset[0])
            end = min(last, shard.offset[0] + shard.shape[0])
            if begin >= end or 0 in shard.shape:
                continue
            other = tuple(
                slice(offset, offset + length) for offset, length in zip(shard.offset[1:], shard.shape[1:], strict=True)
            )
            inside = slice(begin - shard.offset[0], end - shard.offset[0])
            found.append(((slice(begin - first, end - first), *other), self._read(name, shard, inside)))
        if len(found) == 1:
            return found[0][1]
        whole = torch.empty(last - first, *self._shapes[name][1:], dtype=found[0][1].dtype)
        for place, tensor in found:
            whole[place] = tensor
        return whole

    def _read(self, name: str, shard: StoredShard, rows: slice) -> Tensor:
        path = self._folder / shard.file
        try:
            with safe_open(str(path), framework="pt") as file:
                tensor: Tensor = file.get_slice(shard_key(f"{self._prefix}{name}", shard.offset))[rows]
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None
        return tensor
