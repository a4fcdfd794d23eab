"""Megatron-LM's older checkpoints (--ckpt-format torch): one file for each tensor- and pipeline-parallel rank.

    iter_0001000/mp_rank_00/model_optim_rng.pt          tensor-parallel ranks
    iter_0001000/mp_rank_00_001/model_optim_rng.pt      tensor- and pipeline-parallel ranks
    iter_0001000/mp_rank_00/distrib_optim.pt            the distributed optimizer's flat buffers

Source: training/checkpointing.py, core/optimizer of core_v0.16.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.other_trainers.megatron_buffers import places_in_joined_buckets
from titan_cpt.checkpoint.other_trainers.megatron_names import BLOCKS, canonical
from titan_cpt.checkpoint.other_trainers.megatron_ranks import MergedTensors, RankPart
from titan_cpt.checkpoint.other_trainers.torch_files import attributes, load_torch_file, plain_number
from titan_cpt.common.reading import is_there, matching
from titan_cpt.errors import CheckpointError

FILE = "model_optim_rng.pt"
_BUFFERS = "distrib_optim.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_COMPARED = 4096
"""At most this number of elements of a weight is compared with the buffer of the weights, to find it there."""
_KINDS = ("param", "exp_avg", "exp_avg_sq")


class LegacyFiles:
    """The files of all ranks, whose tensors stay on disk until they are read.

    Attributes:
        folder: the checkpoint, such as iter_0001000.
        common: everything in the first rank's file.
    """

    def __init__(self, folder: Path) -> None:
        """Open all files.

        Raises:
            CheckpointError: a rank's file is missing or damaged, or the model is not of megatron.core.
        """
        self.folder = folder
        found: dict[tuple[int, int], Path] = {}
        for path in matching(folder, "mp_rank_*"):
            if match := _RANK.fullmatch(path.name):
                found[int(match[1]), int(match[2] or 0)] = path
        if not found:
            raise CheckpointError(
                f"{folder}: its folders are not mp_rank_00 or mp_rank_00_000 of tensor- and pipeline-parallel ranks; "
                "models with expert parallelism are not available here"
            )
        self.tp = 1 + max(rank for rank, _ in found)
        self.stages = 1 + max(stage for _, stage in found)
        for rank in range(self.tp):
            for stage in range(self.stages):
                if (rank, stage) not in found:
                    raise CheckpointError(
                        f"{folder}: has no folder of tensor-parallel rank {rank}, pipeline stage {stage}, but others "
                        f"of {self.tp} x {self.stages} ranks: copy the whole checkpoint"
                    )
        self.paths = found
        self._content = {place: load_torch_file(path / FILE) for place, path in sorted(found.items())}
        self.common = attributes(self._content[0, 0])
        self._require_core()
        self._require_recorded_ranks()

    def _require_core(self) -> None:
        for place, content in self._content.items():
            chunks = _chunks(content)
            if chunks and not any("language_model" in chunk for chunk in chunks):
                continue
            what = "of Megatron-LM's older model classes (language_model)" if chunks else "absent"
            raise CheckpointError(
                f"{self.paths[place] / FILE}: its model is {what}; only models of megatron.core (GPTModel) are read: "
                "convert it there, with tools/checkpoint/convert.py --saver core"
            )

    def _require_recorded_ranks(self) -> None:
        arguments = attributes(self.common.get("args"))
        for name, found in (("tensor_model_parallel_size", self.tp), ("pipeline_model_parallel_size", self.stages)):
            recorded = arguments.get(name)
            if isinstance(recorded, int) and recorded != found:
                raise CheckpointError(
                    f"{self.folder}: was saved with {name} = {recorded}, but has the folders of {found}: copy the "
                    "whole checkpoint"
                )

    def weights(self, *, gated: bool) -> MergedTensors:
        """The weights of the model, in its own dtype."""
        parts: dict[str, list[RankPart]] = {}
        for (rank, stage), chunk, start in self._ordered_chunks():
            for name, weight in _parameters(self._chunk(rank, stage, chunk), start).items():
                where = f"{self.paths[rank, stage].name}: {name}"
                _add(parts, name, self.tp, RankPart(where, tuple(weight.shape), partial(_itself, weight)))
        return MergedTensors(parts, gated)

    def optimizer(self, *, gated: bool) -> dict[str, MergedTensors]:
        """The moments and, if the model is in bf16, the float32 weights ("param"); empty: the files have none.

        Raises:
            CheckpointError: the tensors are not those of the weights.
        """
        found: dict[str, dict[str, list[RankPart]]] = {kind: {} for kind in _KINDS}
        for (rank, stage), chunk, start in self._ordered_chunks():
            weights = _parameters(self._chunk(rank, stage, chunk), start)
            path = self.paths[rank, stage]
            buffers = is_there(path / _BUFFERS)
            tensors = self._from_buffers(path, chunk, weights) if buffers else self._by_number(rank, stage, weights)
            for kind, by_name in tensors.items():
                for name, tensor in by_name.items():
                    where = f"{path.name}: {kind} of {name}"
                    _add(found[kind], name, self.tp, RankPart(where, tuple(tensor.shape), partial(_itself, tensor)))
        return {kind: MergedTensors(parts, gated) for kind, parts in found.items() if parts}

    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups in the first rank's file."""
        return _groups(self.common.get("optimizer"))

    def step(self) -> Any:
        """The number of updates, if the optimizer counts those of each parameter.

        Raises:
            CheckpointError: the parameters have different numbers, as no checkpoint of Megatron-LM has them.
        """
        saved = attributes(self.common.get("optimizer"))
        state = attributes(saved.get("optimizer", saved)).get("state")
        steps = [attributes(each).get("step") for each in state.values()] if isinstance(state, Mapping) else []
        if any(plain_number(step) != plain_number(steps[0]) for step in steps):
            raise CheckpointError(
                f"{self.folder}: the parameters count different numbers of updates: the files are of different steps; "
                "import with --weights-only to leave out the optimizer state"
            )
        return steps[0] if steps else None

    def _chunk(self, rank: int, stage: int, chunk: int) -> Mapping[str, Any]:
        return _chunks(self._content[rank, stage])[chunk]

    def _ordered_chunks(self) -> Iterator[tuple[tuple[int, int], int, int]]:
        """(tensor-parallel rank, stage), chunk and its first layer, in the order of the layers."""
        first = 0
        for chunk in range(len(_chunks(self._content[0, 0]))):
            for stage in range(self.stages):
                for rank in range(self.tp):
                    yield (rank, stage), chunk, first
                first += _layers(self._chunk(0, stage, chunk))

    def _by_number(self, rank: int, stage: int, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The tensors of optimizers that number the parameters: group by group, in the model's order."""
        path = self.paths[rank, stage] / FILE
        saved = attributes(attributes(self._content[rank, stage]).get("optimizer"))
        inner = attributes(saved.get("optimizer", saved))
        state = inner.get("state")
        if not isinstance(state, Mapping) or not state:
            return {}
        names = _numbered_names(_groups(saved), weights)
        found: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
        for number, name in names.items():
            for kind in _KINDS[1:]:
                found[kind][name] = attributes(state.get(number)).get(kind)
        masters = saved.get("fp32_from_fp16_params")
        if isinstance(masters, list):
            found["param"] = dict(zip(names.values(), [each for group in masters for each in group], strict=False))
        for kind, tensors in found.items():
            for name, tensor in tensors.items():
                if not isinstance(tensor, Tensor) or tensor.shape != weights[name].shape:
                    raise CheckpointError(f"{path}: the optimizer's {kind} of {name} is missing or has another shape")
        _require_same(found["param"], weights, path)
        return found if found["param"] else {kind: found[kind] for kind in _KINDS[1:]}

    def _from_buffers(self, path: Path, chunk: int, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The tensors in the distributed optimizer's flat buffers."""
        content = load_torch_file(path / _BUFFERS)
        buffers = [attributes(inner) for inner in attributes(attributes(content).get(str(chunk))).values()]
        flat = buffers[0] if len(buffers) == 1 else {}
        if not all(isinstance(flat.get(kind), Tensor) for kind in _KINDS):
            raise CheckpointError(
                f"{path / _BUFFERS}: does not have the buffers of one dtype in the form of Megatron-LM since 0.6 "
                "(buckets_coalesced); load it with a newer version and save it again, or import with --weights-only"
            )

        def is_there(name: str, start: int) -> bool:
            weight = weights[name].flatten()[:_COMPARED]
            return torch.equal(flat["param"][start : start + len(weight)].to(weight.dtype), weight)

        sizes = {name: weight.numel() for name, weight in weights.items()}
        places = places_in_joined_buckets(sizes, len(flat["param"]), is_there)
        if places is None:
            raise CheckpointError(
                f"{path / _BUFFERS}: the weights are not where Megatron-LM puts them; import with --weights-only"
            )
        return {
            kind: {
                name: flat[kind][start : start + sizes[name]].view(weights[name].shape)
                for name, (_, start) in places.items()
            }
            for kind in _KINDS
        }


def _chunks(content: Any) -> list[Mapping[str, Any]]:
    """The state dicts of a rank's model chunks: `model`, or `model0`, `model1`, ... with interleaved stages."""
    saved = attributes(content)
    names = (
        ["model"] if "model" in saved else [name for name in (f"model{n}" for n in range(len(saved))) if name in saved]
    )
    return [saved[name] for name in names if isinstance(saved[name], Mapping)]


def _parameters(chunk: Mapping[str, Any], first_layer: int) -> dict[str, Tensor]:
    """A chunk's parameters in the model's order, under their names in the whole model."""
    found = {}
    for name, weight in chunk.items():
        if isinstance(weight, Tensor) and not name.endswith("_extra_state"):
            prefix, _, rest = name.removeprefix(BLOCKS).partition(".")
            whole = f"{BLOCKS}{first_layer + int(prefix)}.{rest}" if name.startswith(BLOCKS) else name
            found[canonical(whole)] = weight
    return found


def _layers(chunk: Mapping[str, Any]) -> int:
    return len({name.split(".")[2] for name in chunk if name.startswith(BLOCKS)})


def _groups(saved: Any) -> list[dict[str, Any]]:
    outer = attributes(saved)
    groups = attributes(outer.get("optimizer", outer)).get("param_groups")
    return [dict(group) for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []


def _numbered_names(groups: Sequence[Mapping[str, Any]], weights: Mapping[str, Tensor]) -> dict[int, str]:
    """Number of each parameter -> name. Biases and vectors are in groups without weight decay (wd_mult 0)."""
    kept = {
        decays: iter([name for name, weight in weights.items() if _decays(name, weight) == decays])
        for decays in (True, False)
    }
    found = {}
    for group in groups:
        for number in group.get("params", ()):
            name = next(kept[group.get("wd_mult", 1.0) != 0.0], None)
            if name is not None:
                found[number] = name
    return found


def _decays(name: str, weight: Tensor) -> bool:
    return weight.ndim > 1 and not name.endswith(".bias")


def _require_same(masters: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
    for name, master in masters.items():
        weight = weights[name].flatten()[:_COMPARED]
        if not torch.equal(master.flatten()[:_COMPARED].to(weight.dtype), weight):
            raise CheckpointError(
                f"{path}: the optimizer's float32 copy of {name} is not this weight: its parameters are in another "
                "order than Megatron-LM's; import with --weights-only"
            )


def _add(parts: dict[str, list[RankPart]], name: str, tp: int, part: RankPart) -> None:
    """Add a rank's part, unless an earlier stage has the same tensor: the embedding of tied models."""
    if len(parts.setdefault(name, [])) < tp:
        parts[name].append(part)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
