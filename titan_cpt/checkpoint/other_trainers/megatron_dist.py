"""Megatron-LM's distributed checkpoints (--ckpt-format torch_dist, its default): a DCP folder with common.pt.

Tensors have the shape of the whole model; those of a block are stacked over all layers, or are saved layer by layer.
The distributed optimizer saves its flat buffers (dp_reshardable, its default), or its state by parameter
(fully_reshardable, which --dist-ckpt-optim-fully-reshardable chooses), as the other optimizers do.
Source: core/dist_checkpointing, core/optimizer of core_v0.16.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.other_trainers.dcp_files import DcpFiles
from titan_cpt.checkpoint.other_trainers.megatron_buffers import Place, places_in_buckets
from titan_cpt.checkpoint.other_trainers.megatron_names import (
    BLOCKS,
    EMBEDDING,
    HEAD,
    LOCAL_NAMES,
    merge,
    split_dim,
)
from titan_cpt.checkpoint.other_trainers.megatron_ranks import MergedTensors, Part, layers_of_chunks
from titan_cpt.errors import CheckpointError

_BUFFERS = re.compile(r"optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_\(.*\)\.bucket_idx_(\d+)\.param")
_COMPARED = 4096
"""So many elements of each weight are compared with the optimizer's buffer."""


class DistTensors:
    """The tensors of a checkpoint whose names begin with a prefix, layer by layer.

    Args:
        files: the checkpoint.
        prefix: "" for the weights, such as "optimizer.state.exp_avg." for a moment.
        layers: of the model.
    """

    def __init__(self, files: DcpFiles, prefix: str, layers: int) -> None:
        self._files = files
        self._prefix = prefix
        self._layers = layers
        self._stored = dict(self._find())

    def _find(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        """Name in the model -> name in the files, and the layer in a stacked tensor."""
        for key in self._files.tensors:
            name = key.removeprefix(self._prefix)
            if not key.startswith(self._prefix) or not name.startswith((BLOCKS, "decoder.final", EMBEDDING, HEAD)):
                continue
            if name.startswith(BLOCKS) and not name.removeprefix(BLOCKS).partition(".")[0].isdigit():
                for layer in range(self._layers):
                    yield f"{BLOCKS}{layer}.{name.removeprefix(BLOCKS)}", (key, layer)
            else:
                yield name, (key, None)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the whole model."""
        key, layer = self._stored[name]
        shape = self._files.tensors[key].shape
        return shape if layer is None else shape[1:]

    def read(self, name: str) -> Tensor:
        """A tensor of the whole model; of a stacked one only this layer is read."""
        key, layer = self._stored[name]
        shape = self._files.tensors[key].shape
        if layer is None:
            return self._files.read(key)
        if layer >= shape[0]:
            raise CheckpointError(f"{self._files.folder}: {key} has {shape[0]} layers, but the model has {self._layers}")
        return self._files.read_part(key, (layer, *[0] * len(shape[1:])), (1, *shape[1:]))[0]

    def where(self, name: str) -> str:
        """A tensor's name in the files."""
        key, layer = self._stored[name]
        return key if layer is None else f"{key}[{layer}]"


def buffered_optimizer(
    files: DcpFiles, weights: DistTensors, arguments: Mapping[str, Any], *, gated: bool
) -> dict[str, MergedTensors] | None:
    """The float32 weights and the moments from the distributed optimizer's flat buffers.

    Returns:
        "param", "exp_avg" and "exp_avg_sq" -> the tensors; None: the checkpoint has no such buffers.

    Raises:
        CheckpointError: the buffers do not hold the weights where Megatron-LM puts them.
    """
    buckets: dict[tuple[int, int], dict[int, str]] = {}
    for key in files.tensors:
        if match := _BUFFERS.fullmatch(key):
            group, buffer, bucket = map(int, match.groups())
            buckets.setdefault((group, buffer), {})[bucket] = key.removesuffix("param")
    if not buckets:
        return None
    tp = int(arguments.get("tensor_model_parallel_size") or 1)
    pp = int(arguments.get("pipeline_model_parallel_size") or 1)
    chunks = max(buffer for _, buffer in buckets) + 1
    try:
        if len(buckets) != tp * pp * chunks:
            raise ValueError(f"{len(buckets)} buffers of {tp} x {pp} ranks")
        ranges = layers_of_chunks(
            int(arguments["num_layers"]), pp, chunks,
            arguments.get("decoder_first_pipeline_num_layers"), arguments.get("decoder_last_pipeline_num_layers"),
        )  # fmt: skip
        return _located(files, weights, buckets, ranges, tp, gated=gated)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{files.folder}: the flat buffers of the distributed optimizer cannot be taken apart ({error}). Save the "
            "checkpoint there with --dist-ckpt-optim-fully-reshardable, or import with --weights-only"
        ) from None


def _located(
    files: DcpFiles,
    weights: DistTensors,
    buckets: Mapping[tuple[int, int], Mapping[int, str]],
    ranges: list[list[range]],
    tp: int,
    *,
    gated: bool,
) -> dict[str, MergedTensors]:
    """Find every parameter in the buffers of all ranks, and compare what is there with its weight."""
    found: dict[str, dict[str, list[Part]]] = {kind: {} for kind in ("param", "exp_avg", "exp_avg_sq")}
    for stage, stage_ranges in enumerate(ranges):
        for chunk, layers in enumerate(stage_ranges):
            first = stage == 0 and chunk == 0
            last = stage == len(ranges) - 1 and chunk == len(stage_ranges) - 1
            for rank in range(tp):
                keys = buckets[stage * tp + rank, chunk]
                names = [keys[bucket] for bucket in range(len(keys))]
                shapes, places = _order_of(files, weights, names, layers, tp, rank, first=first, last=last, gated=gated)
                for name, (bucket, start) in places.items():
                    shape = shapes[name]
                    for kind, parts in found.items():
                        key = names[bucket] + kind
                        read = partial(_read_flat, files, key, start, shape)
                        parts.setdefault(name, []).append(Part(f"{key}[{start:,}...]", shape, read))
    whole = {name: tp for name in found["param"]}
    if any(len(found["param"][name]) % count for name, count in whole.items()):
        raise ValueError("a parameter is in the buffers of some ranks only")
    return {
        kind: MergedTensors({name: list_[:tp] for name, list_ in parts.items()}, gated) for kind, parts in found.items()
    }


def _order_of(
    files: DcpFiles,
    weights: DistTensors,
    buckets: list[str],
    layers: range,
    tp: int,
    rank: int,
    *,
    first: bool,
    last: bool,
    gated: bool,
) -> tuple[dict[str, tuple[int, ...]], dict[str, Place]]:
    """The parameters of one rank with their shapes, and where they are: in the order of one of the kinds of layers."""
    sizes = [files.tensors[f"{bucket}param"].shape[0] for bucket in buckets]
    for order in (_transformer_engine_order, _local_order):
        names = _parameters(weights, layers, order, first=first, last=last)
        shapes = {name: _part_shape(name, weights.shape(name), tp) for name in names}
        places = places_in_buckets({name: math.prod(shape) for name, shape in shapes.items()}, sizes)
        if places is not None and all(
            _is_weight(files, weights, name, f"{buckets[bucket]}param", start, shapes[name], tp, rank, gated=gated)
            for name, (bucket, start) in places.items()
        ):
            return shapes, places
    raise ValueError(f"the weights are not in {buckets[0]}param in the order of the model")


def _parameters(weights: DistTensors, layers: range, order: Any, *, first: bool, last: bool) -> list[str]:
    """Names of a chunk's parameters in the order of Megatron-LM's modules."""
    there = weights.names()
    names = [EMBEDDING] if first else []
    for layer in layers:
        prefix = f"{BLOCKS}{layer}."
        names += sorted((name for name in there if name.startswith(prefix)), key=lambda name: order(name, prefix))
    if last:
        names += [name for name in there if name.startswith("decoder.final")]
        names += [HEAD] if HEAD in there else [] if first else [EMBEDDING]
    return names
