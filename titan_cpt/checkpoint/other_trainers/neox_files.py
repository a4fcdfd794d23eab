"""The files of a GPT-NeoX checkpoint, which DeepSpeed writes: weights by layer or by rank, and ZeRO's shards.

    global_step1000/layer_02-model_00-model_states.pt                    a layer of tensor-parallel rank 0 (pipeline)
    global_step1000/mp_rank_00_model_states.pt                           all layers of a rank, or only the step
    global_step1000/[bf16_]zero_pp_rank_3_mp_rank_01_optim_states.pt     data-parallel rank 3's share of ZeRO-1 and 2
    global_step1000/configs/                                             copies of the config files

Sources: GPT-NeoX ea7aefd8, DeepSpeed 0.19.8: runtime/engine.py, pipe/module.py, zero/stage_1_and_2.py,
bf16_optimizer.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.other_trainers.megatron_ranks import RankPart
from titan_cpt.checkpoint.other_trainers.torch_files import attributes, load_torch_file
from titan_cpt.common.reading import matching
from titan_cpt.errors import CheckpointError

_LAYER = re.compile(r"layer_(\d{2,})-model_(\d{2,})-model_states\.pt")
_RANK = re.compile(r"mp_rank_(\d{2,})_model_states\.pt")
_SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d{2,})_optim_states\.pt")
_FP32, _BASE, _MAPPINGS = "single_partition_of_fp32_groups", "base_optimizer_state", "param_slice_mappings"

Parts = dict[str, list[RankPart]]
"""Name -> the part of each tensor-parallel rank."""


class NeoxFiles:
    """The files of one checkpoint, whose tensors stay on disk until they are read.

    Attributes:
        folder: the checkpoint.
        tp: tensor-parallel degree.
        ranks: what the files of all model-parallel ranks hold: step counts and, without pipeline stages, the weights.
        weights: name -> the part of each tensor-parallel rank.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files with weights.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        self.folder = folder
        self.ranks = {
            int(match[1]): attributes(load_torch_file(path)) for path, match in _matched(folder, _RANK, "mp_rank_*")
        }
        if not self.ranks:
            raise CheckpointError(f"{folder}: has no mp_rank_00_model_states.pt: copy the whole checkpoint")
        layers = list(_matched(folder, _LAYER, "layer_*"))
        self.weights: Parts = dict(self._by_layer(layers) if layers else self._by_rank())

    def _by_layer(self, found: Sequence[tuple[Path, re.Match[str]]]) -> Iterator[tuple[str, list[RankPart]]]:
        """The weights of a model with pipeline stages."""
        self.tp = 1 + max(int(match[2]) for _, match in found)
        paths = {(int(match[1]), int(match[2])): path for path, match in found}
        for layer in sorted({layer for layer, _ in paths}):
            missing = [rank for rank in range(self.tp) if (layer, rank) not in paths]
            if missing:
                raise CheckpointError(
                    f"{self.folder}: has no layer_{layer:02d}-model_{missing[0]:02d}-model_states.pt, but that of "
                    f"another of {self.tp} tensor-parallel ranks: copy the whole checkpoint"
                )
            content = [attributes(load_torch_file(paths[layer, rank])) for rank in range(self.tp)]
            yield from _joined({f"{layer}.": content}, [paths[layer, rank].name for rank in range(self.tp)])

    def _by_rank(self) -> Iterator[tuple[str, list[RankPart]]]:
        """The weights of a model without pipeline stages."""
        self.tp = len(self.ranks)
        content = [attributes(state.get("module")) for state in self.ranks.values()]
        if sorted(self.ranks) != list(range(self.tp)) or not all(content):
            raise CheckpointError(
                f"{self.folder}: has neither layer_*-model_*-model_states.pt nor the weights of all ranks in mp_rank_*"
            )
        plain = [{name.removeprefix("sequential."): value for name, value in each.items()} for each in content]
        yield from _joined({"": plain}, [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(self.tp)])

    def optimizer(self) -> tuple[dict[str, Parts], list[dict[str, Any]], Any]:
        """ZeRO's float32 weights ("param") and moments, the parameter groups, and the step that it counts.

        Raises:
            CheckpointError: there are none, or in a form that cannot be read.
        """
        shards: dict[int, dict[int, Path]] = {}
        for path, match in _matched(self.folder, _SHARD, "*zero_pp_rank_*"):
            shards.setdefault(int(match[2]), {})[int(match[1])] = path
        found: dict[str, Parts] = {kind: {} for kind in ("param", "exp_avg", "exp_avg_sq")}
        groups: list[dict[str, Any]] = []
        step: Any = None
        for rank in sorted(self.ranks):
            opened = self._shards_of(rank, shards.get(rank, {}))
            if rank == 0 and opened:
                base = attributes(opened[0].get(_BASE))
                groups = [dict(group) for group in base.get("param_groups", ()) if isinstance(group, Mapping)]
                step = next((attributes(each).get("step") for each in _groups_of(base).values()), None)
            for kind, parts in found.items():
                for name, part in self._located(rank, opened, kind):
                    if len(parts.setdefault(name, [])) < self.tp:  # a tied embedding is in two stages
                        parts[name].append(part)
        return found, groups, step

    def _shards_of(self, rank: int, paths: Mapping[int, Path]) -> list[Mapping[str, Any]]:
        """The optimizer states of all data-parallel ranks of a model-parallel rank."""
        states = []
        for number in range(1 + max(paths, default=-1)):
            if number not in paths:
                raise CheckpointError(
                    f"{self.folder}: has no zero_pp_rank_{number}_mp_rank_{rank:02d}_optim_states.pt: copy the whole "
                    "checkpoint, or import with --weights-only"
                )
            states.append(attributes(attributes(load_torch_file(paths[number])).get("optimizer_state_dict")))
        if not states or any(_FP32 not in state or not isinstance(state.get(_BASE), Mapping) for state in states):
            raise CheckpointError(
                f"{self.folder}: has no optimizer state of ZeRO-1 or ZeRO-2 of model-parallel rank {rank} (DeepSpeed "
                "since 0.5); no other is read: import with --weights-only"
            )
        for state in states:
            count = state.get("partition_count")
            saved = max(count) if isinstance(count, list | tuple) and count else count
            if isinstance(saved, int) and saved != len(states):
                raise CheckpointError(
                    f"{self.folder}: has {len(states)} shards of the optimizer of model-parallel rank {rank}, but it "
                    f"was saved with {saved}: copy the whole checkpoint, or import with --weights-only"
                )
        return states

    def _located(self, rank: int, shards: Sequence[Mapping[str, Any]], kind: str) -> Iterator[tuple[str, RankPart]]:
        """Every parameter of a model-parallel rank, in the flat tensors of its data-parallel ranks."""
        shapes = self.ranks[rank].get("param_shapes")
        if not isinstance(shapes, list):
            raise CheckpointError(
                f"{self.folder}: mp_rank_{rank:02d}_model_states.pt has no param_shapes, so ZeRO's shards cannot be "
                "taken apart (DeepSpeed before 0.5); import with --weights-only"
            )
        for number, group in enumerate(shapes):
            flat = [_flat(shard, number, kind, self.folder) for shard in shards]
            end = 0
            for name, shape in attributes(group).items():
                elements = math.prod(shape)
                pieces = _mapped(shards, number, name)
                if pieces is None:
                    pieces = _cut([len(each) for each in flat], end, elements)
                    end += elements
                if sum(length for _, _, length in pieces) != elements:
                    raise CheckpointError(f"{self.folder}: the shards of the optimizer lack a part of {name}")
                read = partial(_read, flat, pieces, tuple(shape))
                yield _plain(name), RankPart(f"{kind} of {name} (mp_rank_{rank:02d})", tuple(shape), read)


def _matched(folder: Path, pattern: re.Pattern[str], glob: str) -> Iterator[tuple[Path, re.Match[str]]]:
    for path in matching(folder, glob):
        if match := pattern.fullmatch(path.name):
            yield path, match


def _joined(
    states: Mapping[str, Sequence[Mapping[str, Any]]], files: Sequence[str]
) -> Iterator[tuple[str, list[RankPart]]]:
    for prefix, content in states.items():
        for name, first in content[0].items():
            if not isinstance(first, Tensor) or name.endswith("rotary_emb.inv_freq"):
                continue
            tensors = [each.get(name) for each in content]
            if not all(isinstance(tensor, Tensor) for tensor in tensors):
                raise CheckpointError(f"{files[0]} has {name}, but the file of another rank has not")
            yield (
                prefix + name,
                [
                    RankPart(f"{file}: {name}", tuple(tensor.shape), partial(_itself, tensor))
                    for file, tensor in zip(files, tensors, strict=True)
                    if isinstance(tensor, Tensor)
                ],
            )


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _plain(name: str) -> str:
    """A parameter's name in the sequence of layers."""
    return name.removeprefix("module.").removeprefix("sequential.").replace("tied_modules.embed.", "0.")


def _groups_of(base: Mapping[str, Any]) -> Mapping[Any, Any]:
    state = base.get("state")
    return state if isinstance(state, Mapping) else {}


def _flat(shard: Mapping[str, Any], group: int, kind: str, folder: Path) -> Tensor:
    """A data-parallel rank's flat tensor of a group."""
    if kind == "param":
        tensors = shard[_FP32]
        tensor = tensors[group] if isinstance(tensors, list | tuple) and group < len(tensors) else None
    else:
        tensor = attributes(_groups_of(attributes(shard[_BASE])).get(group)).get(kind)
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{folder}: the optimizer's shards have no {kind} of parameter group {group}")
    return tensor.flatten()


def _mapped(shards: Sequence[Mapping[str, Any]], group: int, name: str) -> list[tuple[int, int, int]] | None:
    """(shard, start, elements) of the pieces of a parameter, where DeepSpeed wrote them down."""
    found = []
    for number, shard in enumerate(shards):
        mappings = shard.get(_MAPPINGS)
        if not isinstance(mappings, list) or group >= len(mappings):
            return None
        fragment = attributes(attributes(mappings[group]).get(name))
        if fragment:
            found.append((number, int(fragment["start"]), int(fragment["numel"])))
    return found


def _cut(lengths: Sequence[int], start: int, elements: int) -> list[tuple[int, int, int]]:
    """The pieces of a range of tensors that follow one another."""
    found, first = [], 0
    for number, length in enumerate(lengths):
        low, high = max(start, first), min(start + elements, first + length)
        if low < high:
            found.append((number, low - first, high - low))
        first += length
    return found


def _read(flat: Sequence[Tensor], pieces: Sequence[tuple[int, int, int]], shape: tuple[int, ...]) -> Tensor:
    parts = [flat[number][start : start + length] for number, start, length in pieces]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).view(shape)
