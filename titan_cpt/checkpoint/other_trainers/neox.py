"""GPT-NeoX's checkpoints: DeepSpeed's folders with weights by layer (pipeline stages) or by rank, and ZeRO-1 or 2.

The model comes from the copies of the config files in the checkpoint, or from a config. Names, layouts and options are
those of GPT-NeoX ea7aefd8 and DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.other_trainers.model_config import spec_of_trainer_config, spec_of_trainer_configs
from titan_cpt.checkpoint.other_trainers.neox_files import NeoxFiles, Parts
from titan_cpt.checkpoint.other_trainers.neox_names import (
    NEOX_EMBEDDING,
    NeoxPlace,
    merge_parts,
    part_of,
    places,
    shape_of_part,
    whole_shape,
)
from titan_cpt.checkpoint.other_trainers.torch_files import counted, known_number, plain_number
from titan_cpt.checkpoint.other_trainers.trained_checkpoint import (
    MOMENTS,
    AdamWState,
    ImportRequest,
    StoredTensor,
    TrainedCheckpoint,
    require_layers,
)
from titan_cpt.common.reading import is_there, matching, read_text
from titan_cpt.errors import CheckpointError
from titan_cpt.models.gpt_neox.spec import GPTNeoXSpec
from titan_cpt.models.spec import ModelSpec

_LATEST = "latest"
_FUSED_GELU = re.compile(r"bias[-_]gelu[-_]fusion[\"']?\s*:\s*true", re.IGNORECASE)
_GELU = (
    "with bias_gelu_fusion GPT-NeoX computes GELU by its tanh approximation; family gpt_neox computes the exact one, "
    "which differs by up to 0.0005"
)


def open_neox(request: ImportRequest) -> TrainedCheckpoint:
    """Open a checkpoint of GPT-NeoX.

    Raises:
        CheckpointError: it is not a checkpoint of such a model, or incomplete.
        ConfigError: the model is not available here, or the config cannot be read.
    """
    folder = _checkpoint_folder(request.path)
    files = NeoxFiles(folder)
    if NEOX_EMBEDDING not in files.weights:
        some = ", ".join(list(files.weights)[:3])
        raise CheckpointError(f"{folder}: has no {NEOX_EMBEDDING}, so it is not a model of GPT-NeoX; it has {some}")
    rows = whole_shape(NEOX_EMBEDDING, files.weights[NEOX_EMBEDDING][0].shape, files.tp)[0]
    spec = _spec(request, folder, rows)
    require_layers(spec, len(files.weights), str(folder))
    optimizer: Mapping[str, Parts] = {}
    groups: list[dict[str, Any]] = []
    step = None
    if not request.weights_only:
        optimizer, groups, stored = files.optimizer()
        step = _step(folder, groups, stored)
    reader = _NeoxReader(folder, spec, files, optimizer)
    found = {ours: place for ours in places(spec) if (place := reader.place_of(ours)) is not None}
    used = {place.names[0] for place in found.values()} | {f"{spec.layers + 4}.word_embeddings.weight"}
    steps = known_number(files.ranks[min(files.ranks)].get("global_steps"))
    group = next((each for each in groups if each.get("weight_decay")), groups[0] if groups else {})
    return TrainedCheckpoint(
        trainer="GPT-NeoX",
        spec=spec,
        weights={ours: reader.weight(ours, place) for ours, place in found.items()},
        optimizer={ours: reader.state(ours, place, step) for ours, place in found.items()} if step is not None else {},
        foreign=[name for name in files.weights if name not in used],
        step=None if steps is None else int(steps),
        next_lr=known_number(group.get("lr")),
        settings=_settings(group),
        not_imported=["optimizer: as --weights-only says"] if request.weights_only else [],
        notes=list(_notes(spec, files, folder)),
    )


def _checkpoint_folder(path: Path) -> Path:
    """The folder of one checkpoint: the path, or the newest one in it."""
    if matching(path, "mp_rank_*_model_states.pt") or matching(path, "layer_*-model_*-model_states.pt"):
        return path
    if is_there(path / _LATEST):
        newest = read_text(path / _LATEST).strip()
        if Path(newest).name != newest or newest in ("", "..") or not is_there(path / newest):
            raise CheckpointError(f"{path / _LATEST}: names {newest[:80]!r}, which is no folder in {path}")
        return path / newest
    if not is_there(path):
        raise CheckpointError(f"{path}: no such folder; give the folder of one checkpoint, such as global_step1000")
    inside = [each.name for each in matching(path, "global_step*")]
    more = f"; give one of {', '.join(inside[-3:])} in it" if inside else ""
    raise CheckpointError(f"{path}: has no mp_rank_*_model_states.pt, so it is no checkpoint of GPT-NeoX{more}")


def _spec(request: ImportRequest, folder: Path, rows: int) -> ModelSpec:
    if request.config is not None:
        return spec_of_trainer_config(request.config, "gpt-neox", rows=rows)
    configs = [path for path in matching(folder, "configs", "*") if path.suffix in (".yml", ".yaml")]
    if not configs:
        raise CheckpointError(
            f"{folder}: has no configs/*.yml, so the model is unknown: give the config with --config FILE.yml, or a "
            "TOML file with [model]"
        )
    return spec_of_trainer_configs(configs, "gpt-neox", rows=rows)


def _step(folder: Path, groups: list[dict[str, Any]], stored: Any) -> int:
    for value in (stored, *(group.get("step") for group in groups)):
        if value is not None:
            return counted(value, f"{folder}: the optimizer's step")
    raise CheckpointError(f"{folder}: does not say how many updates its moments count; import with --weights-only")


@dataclass(frozen=True)
class _NeoxReader:
    """Weights and moments under our names."""

    folder: Path
    spec: ModelSpec
    files: NeoxFiles
    optimizer: Mapping[str, Parts]

    def place_of(self, ours: str) -> NeoxPlace | None:
        """Where a weight is in these files, with the one name that they have; None: it is not there."""
        for place in places(self.spec)[ours]:
            for name in place.names:
                if name in self.files.weights:
                    return NeoxPlace((name,), place.part)
        return None

    def weight(self, ours: str, place: NeoxPlace) -> StoredTensor:
        """A weight: the optimizer's float32 copy of it, if there is one."""
        masters = self.optimizer.get("param", {})
        if place.names[0] not in masters:
            return self._stored(place, self.files.weights, "param")
        return self._stored(place, masters, "param")

    def state(self, ours: str, place: NeoxPlace, step: int) -> AdamWState:
        """AdamW's state of a weight."""
        first, second = (self._stored(place, self.optimizer[moment], moment) for moment in MOMENTS)
        return AdamWState(exp_avg=first, exp_avg_sq=second, step=step)

    def _stored(self, place: NeoxPlace, parts: Parts, kind: str) -> StoredTensor:
        (name,) = place.names
        if len(parts.get(name, ())) != self.files.tp:
            raise CheckpointError(
                f"{self.folder}: the optimizer state of {name} is missing; import with --weights-only"
            )
        shape = whole_shape(name, parts[name][0].shape, self.files.tp)
        where = parts[name][0].where + (f" ({place.part})" if place.part else "")
        return StoredTensor(where, shape_of_part(place.part, shape, self.spec), partial(self._read, place, parts, kind))

    def _read(self, place: NeoxPlace, parts: Parts, kind: str) -> Tensor:
        (name,) = place.names
        tensors = [part.read() for part in parts[name]]
        if kind == "param" and parts is not self.files.weights:
            self._require_same(name, tensors)
        summed = kind == "param" and isinstance(self.spec, GPTNeoXSpec) and self.spec.parallel_residual
        return part_of(place.part, merge_parts(name, tensors, self.spec, summed=summed), self.spec)

    def _require_same(self, name: str, masters: list[Tensor]) -> None:
        for part, master in zip(self.files.weights[name], masters, strict=True):
            weight = part.read()
            if not torch.equal(master.to(weight.dtype), weight):
                raise CheckpointError(
                    f"{self.folder}: the optimizer's float32 copy of {part.where} rounds to other values than the "
                    "model has: they are of different steps, or a file is damaged. Import with --weights-only to use "
                    "the model's"
                )


def _settings(group: Mapping[str, Any]) -> dict[str, float]:
    betas = group.get("betas")
    values: dict[str, Any] = {key: group.get(key) for key in ("weight_decay", "eps")}
    if isinstance(betas, list | tuple) and len(betas) == 2:
        values |= {"beta1": betas[0], "beta2": betas[1]}
    found = {f"optimizer.{key}": plain_number(value) for key, value in values.items()}
    return {key: value for key, value in found.items() if value is not None}


def _notes(spec: ModelSpec, files: NeoxFiles, folder: Path) -> Iterator[str]:
    if not isinstance(spec, GPTNeoXSpec):
        return
    if files.tp > 1 and spec.parallel_residual:
        yield (
            f"each of {files.tp} tensor-parallel ranks added its own bias to the residual stream. The imported biases "
            f"are their sums, which GPT-NeoX's optimizer moved {files.tp} times as far per step as AdamW moves one here"
        )
    texts = [read_text(path) for path in matching(folder, "configs", "*.yml")]
    if any(_FUSED_GELU.search(text) for text in texts):
        yield _GELU
