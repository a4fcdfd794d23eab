"""AdamW's state in Megatron-LM's distributed checkpoints, in each of the forms that its optimizers save.

    by parameter    optimizer.state.<moment>.<parameter>: of FP32Optimizer and Float16Optimizer, and of the distributed
                    optimizer with --dist-ckpt-optim-fully-reshardable
    flat buffers    optimizer.distributed...: of the distributed optimizer by default (dp_reshardable)

Source: core/optimizer/distrib_optimizer.py, optimizer.py of core_v0.16.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.other_trainers.dcp_files import DcpFiles
from titan_cpt.checkpoint.other_trainers.megatron_buffers import Place, places_in_buckets
from titan_cpt.checkpoint.other_trainers.megatron_dist import DistTensors
from titan_cpt.checkpoint.other_trainers.megatron_names import BLOCKS, EMBEDDING, HEAD, LAYER_ORDERS, split_dim
from titan_cpt.checkpoint.other_trainers.megatron_ranks import MergedTensors, RankPart, Tensors, layers_of_chunks
from titan_cpt.errors import CheckpointError

_STATE = "optimizer.state."
_MASTERS = ("param", "fp32_param")  # the distributed optimizer's float32 weights, and Float16Optimizer's
_BUFFER = re.compile(
    r"(optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_\(.*\)\.bucket_idx_(\d+)\.)param"
)
_COMPARED = 4096
"""At most this number of elements of a weight is compared with the buffer of the weights, to find it there."""


def distributed_optimizer(
    files: DcpFiles, weights: DistTensors, arguments: Mapping[str, Any], *, layers: int, gated: bool
) -> dict[str, Tensors]:
    """The optimizer's tensors: "exp_avg", "exp_avg_sq", and "param", the float32 weights, if the model is in bf16.

    Args:
        weights: the model's.
        arguments: Megatron-LM's, which say how ranks shared the model.
        gated: the MLP is SwiGLU.

    Raises:
        CheckpointError: they are in a form that cannot be read.
    """
    found: dict[str, Tensors] = {}
    for kind in ("exp_avg", "exp_avg_sq", *_MASTERS):
        tensors = DistTensors(files, f"{_STATE}{kind}.", layers)
        if tensors.names():
            found["param" if kind in _MASTERS else kind] = tensors
    buffers = _find_buffers(files)
    if buffers:
        return dict(_Buffers(files, weights, buffers, arguments, layers=layers, gated=gated).tensors())
    for kind, stored in found.items():
        name = stored.names()[0]
        if len(stored.shape(name)) != len(weights.shape(name)):
            raise CheckpointError(
                f"{files.folder}: {kind} is saved in flattened ranges (fully_sharded_model_space of Megatron-LM before "
                "0.16), which cannot be read here: load it with a newer version and save it with "
                "--dist-ckpt-optim-fully-reshardable, or import with --weights-only"
            )
    return found


def _find_buffers(files: DcpFiles) -> dict[tuple[int, int], dict[int, str]]:
    """(rank of the model-parallel group, model chunk) -> bucket -> start of the names of its tensors."""
    found: dict[tuple[int, int], dict[int, str]] = {}
    for key in files.tensors:
        if match := _BUFFER.fullmatch(key):
            prefix, rank, chunk, bucket = match.groups()
            found.setdefault((int(rank), int(chunk)), {})[int(bucket)] = prefix
    return found


@dataclass(frozen=True)
class _Rank:
    """One tensor-parallel rank's parameters of one model chunk.

    Attributes:
        index: of the rank among the tensor-parallel ranks.
        names: parameters in the model's order.
        buckets: start of the names of each bucket's tensors.
    """

    index: int
    names: Sequence[str]
    buckets: Sequence[str]


class _Buffers:
    """The flat buffers of all ranks, taken apart."""

    def __init__(
        self,
        files: DcpFiles,
        weights: DistTensors,
        buffers: Mapping[tuple[int, int], Mapping[int, str]],
        arguments: Mapping[str, Any],
        *,
        layers: int,
        gated: bool,
    ) -> None:
        self._files = files
        self._weights = weights
        self._buffers = buffers
        self._gated = gated
        self._tp = int(arguments.get("tensor_model_parallel_size") or 1)
        stages = int(arguments.get("pipeline_model_parallel_size") or 1)
        chunks = max(chunk for _, chunk in buffers) + 1
        if len(buffers) != self._tp * stages * chunks:
            raise self._failure(f"{len(buffers)} buffers, but tensor x pipeline size {self._tp} x {stages}")
        ends = (arguments.get(f"decoder_{end}_pipeline_num_layers") for end in ("first", "last"))
        try:
            self._ranges = layers_of_chunks(layers, stages, chunks, *ends)
        except ValueError as error:
            raise self._failure(str(error)) from None

    def tensors(self) -> dict[str, MergedTensors]:
        """The float32 weights and the moments of the whole model."""
        found: dict[str, dict[str, list[RankPart]]] = {kind: {} for kind in ("param", "exp_avg", "exp_avg_sq")}
        for stage, ranges in enumerate(self._ranges):
            for chunk, layers in enumerate(ranges):
                ends = (stage, chunk) == (0, 0), (stage, chunk) == (len(self._ranges) - 1, len(ranges) - 1)
                for index in range(self._tp):
                    buckets = self._buffers.get((stage * self._tp + index, chunk), {})
                    keys = [buckets[number] for number in sorted(buckets)]
                    self._add(found, index, keys, layers, ends)
        return {kind: MergedTensors(parts, self._gated) for kind, parts in found.items()}

    def _add(
        self,
        found: dict[str, dict[str, list[RankPart]]],
        index: int,
        buckets: Sequence[str],
        layers: range,
        ends: tuple[bool, bool],
    ) -> None:
        """Add one rank's parameters of one chunk."""
        for order in LAYER_ORDERS:
            rank = _Rank(index, self._names(layers, order, *ends), buckets)
            places = self._places(rank)
            if places is not None:
                break
        else:
            raise self._failure(f"the weights are not where they should be in {buckets[0] if buckets else 'them'}")
        for name, (bucket, start) in places.items():
            shape = self._local_shape(name)
            for kind, parts in found.items():
                if len(parts.setdefault(name, [])) < self._tp:  # the embedding of tied models is in two stages
                    key = buckets[bucket] + kind
                    parts[name].append(RankPart(f"{key} from {start}", shape, partial(self._read, key, start, shape)))

    def _names(self, layers: range, order: Sequence[str], first: bool, last: bool) -> list[str]:
        """The parameters of a chunk in the order in which Megatron-LM's modules have them."""
        there = self._weights.names()
        names = [EMBEDDING] if first else []
        names += [name for layer in layers for each in order if (name := f"{BLOCKS}{layer}.{each}") in there]
        if last:
            names += [name for name in there if name.startswith("decoder.final_layernorm.")]
            names += [HEAD] if HEAD in there else [] if first else [EMBEDDING]
        return names

    def _places(self, rank: _Rank) -> dict[str, Place] | None:
        """Where the parameters are, if their weights are there."""
        lengths = [self._files.tensors[f"{bucket}param"].shape[0] for bucket in rank.buckets]
        sizes = {name: math.prod(self._local_shape(name)) for name in rank.names}
        places = places_in_buckets(sizes, lengths)
        if places is None:
            return None
        for name, (bucket, start) in places.items():
            weight = self._first_row(name, rank.index)
            master = self._read(f"{rank.buckets[bucket]}param", start, (weight.numel(),))
            if not torch.equal(master.to(weight.dtype), weight):
                return None
        return places

    def _local_shape(self, name: str) -> tuple[int, ...]:
        dim = split_dim(name)
        shape = self._weights.shape(name)
        return tuple(length // (self._tp if axis == dim else 1) for axis, length in enumerate(shape))

    def _first_row(self, name: str, index: int) -> Tensor:
        """The first elements of a weight on one rank, flat. Of a SwiGLU weight it has the gate's rows first."""
        dim = split_dim(name)
        shape = self._local_shape(name)
        rows = shape[0]
        if self._gated and name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
            rows //= 2
        at = tuple(index * (rows if axis == 0 else length) * (axis == dim) for axis, length in enumerate(shape))
        box = (1, *shape[1:]) if len(shape) > 1 else (min(rows, _COMPARED),)
        return self._weights.read_part(name, at, box).flatten()[:_COMPARED]

    def _read(self, key: str, start: int, shape: tuple[int, ...]) -> Tensor:
        return self._files.read_part(key, (start,), (math.prod(shape),)).view(shape)

    def _failure(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._files.folder}: the flat buffers of the distributed optimizer cannot be taken apart: {reason}. "
            "Save the checkpoint there with --dist-ckpt-optim-fully-reshardable, or import with --weights-only"
        )
