"""Megatron-LM's checkpoints of GPTModel: distributed ones (torch_dist), and one file for each rank (torch).

The model comes from the arguments in the checkpoint, or from a config. Names, layouts and options are those of
core_v0.16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.other_trainers.dcp_files import DcpFiles
from titan_cpt.checkpoint.other_trainers.dcp_metadata import METADATA
from titan_cpt.checkpoint.other_trainers.megatron_arguments import spec_from_arguments
from titan_cpt.checkpoint.other_trainers.megatron_dist import DistTensors
from titan_cpt.checkpoint.other_trainers.megatron_dist_optimizer import distributed_optimizer
from titan_cpt.checkpoint.other_trainers.megatron_legacy import FILE, LegacyFiles
from titan_cpt.checkpoint.other_trainers.megatron_names import EMBEDDING, HEAD, Source, part_shape, sources, take_part
from titan_cpt.checkpoint.other_trainers.megatron_ranks import Tensors
from titan_cpt.checkpoint.other_trainers.model_config import spec_of_trainer_config
from titan_cpt.checkpoint.other_trainers.torch_files import (
    attributes,
    counted,
    known_number,
    load_torch_file,
    plain_number,
)
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
from titan_cpt.models.llama.spec import LlamaSpec
from titan_cpt.models.spec import ModelSpec

_TRACKER = "latest_checkpointed_iteration.txt"
_COMMON = "common.pt"
_MTP = "mtp."
_GELU = (
    "Megatron-LM computes GELU by its tanh approximation where it fuses bias and GELU (its default); family gpt_neox "
    "computes the exact one, which differs by up to 0.0005"
)


@dataclass
class _Found:
    """What a checkpoint holds.

    Attributes:
        spec: the model.
        weights: its weights in their own dtype.
        optimizer: "exp_avg", "exp_avg_sq" and, if the model is not in float32, "param", its float32 weights.
        common: everything that is stored once.
        groups: the optimizer's parameter groups.
        step: updates that the optimizer counts; None: not stored.
        extra: names of tensors that are not of the model.
    """

    spec: ModelSpec
    weights: Tensors
    optimizer: Mapping[str, Tensors]
    common: Mapping[str, Any]
    groups: list[dict[str, Any]]
    step: int | None
    extra: list[str] = field(default_factory=list)


def open_megatron(request: ImportRequest) -> TrainedCheckpoint:
    """Open a checkpoint of Megatron-LM.

    Raises:
        CheckpointError: it is not a checkpoint of such a model, or incomplete.
        ConfigError: the model is not available here, or the config cannot be read.
    """
    folder = _checkpoint_folder(request.path)
    found = _distributed(folder, request) if is_there(folder / METADATA) else _legacy(folder, request)
    arguments = attributes(found.common.get("args"))
    kept = sources(found.spec)
    there = set(found.weights.names())
    reader = _Reader(found, kept, folder)
    optimizer = {ours: reader.state(ours) for ours in kept} if set(MOMENTS) <= found.optimizer.keys() else {}
    used = {source.name for source in kept.values()} | ({HEAD} if found.spec.tied else set())
    seq_len, samples = (known_number(arguments.get(name)) for name in ("seq_length", "consumed_train_samples"))
    return TrainedCheckpoint(
        trainer="Megatron-LM",
        spec=found.spec,
        weights={ours: reader.weight(ours) for ours, source in kept.items() if source.name in there},
        optimizer=optimizer,
        foreign=sorted(there - used) + [name for name in found.extra if not name.startswith(_MTP)],
        step=None if (iteration := known_number(found.common.get("iteration"))) is None else int(iteration),
        tokens=int(samples * seq_len) if samples and seq_len else None,
        next_lr=known_number(_decayed_group(found.groups).get("lr")),
        settings=_settings(found.groups) if optimizer else {},
        seq_len=int(seq_len) if seq_len else None,
        not_imported=list(_not_imported(found, request, arguments)),
        notes=list(_notes(found, request, arguments)),
    )


def _checkpoint_folder(path: Path) -> Path:
    """The folder of one checkpoint: the path, or the newest one in it."""
    if is_there(path / METADATA) or matching(path, "mp_rank_*"):
        return path
    if is_there(path / _TRACKER):
        newest = read_text(path / _TRACKER).strip()
        if Path(newest).name != newest or newest in ("", ".."):
            raise CheckpointError(f"{path / _TRACKER}: names {newest[:80]!r}, which is no folder in {path}")
        folder = path / (newest if newest == "release" else f"iter_{int(newest):07d}" if newest.isdecimal() else newest)
        if is_there(folder / METADATA) or matching(folder, "mp_rank_*"):
            return folder
        raise CheckpointError(f"{folder}: is not a checkpoint of Megatron-LM, but {path / _TRACKER} names it")
    if not is_there(path):
        raise CheckpointError(f"{path}: no such folder; give the folder of one checkpoint, such as iter_0001000")
    inside = [each.name for each in matching(path, "iter_*")]
    more = f"; give one of {', '.join(inside[-3:])} in it" if inside else ""
    raise CheckpointError(
        f"{path}: has neither {METADATA} nor mp_rank_00/{FILE}, so it is no Megatron-LM checkpoint{more}"
    )


def _distributed(folder: Path, request: ImportRequest) -> _Found:
    files = DcpFiles(folder)
    common = attributes(load_torch_file(folder / _COMMON)) if is_there(folder / _COMMON) else {}
    if EMBEDDING not in files.tensors:
        some = ", ".join(list(files.tensors)[:3])
        raise CheckpointError(f"{folder}: has no {EMBEDDING}, so it is not a GPTModel of Megatron-LM; it has {some}")
    arguments = attributes(common.get("args"))
    spec = _spec(request, arguments, files.tensors[EMBEDDING].shape[0], folder / _COMMON)
    stacked = max((entry.shape[0] for entry in files.tensors.values() if entry.shape), default=0)
    require_layers(spec, max(stacked, len(files.tensors)), str(folder))
    weights = DistTensors(files, "", spec.layers)
    optimizer: Mapping[str, Tensors] = {}
    if _wants_optimizer(request, arguments):
        gated = isinstance(spec, LlamaSpec)
        optimizer = distributed_optimizer(files, weights, arguments, layers=spec.layers, gated=gated)
        _require_moments(files, optimizer)
    saved = attributes(common.get("optimizer"))
    inner = attributes(saved.get("optimizer", saved))
    groups = inner.get("param_groups")
    if not isinstance(groups, list):
        objects = sorted(
            name for name in files.objects if name.startswith("optimizer.distributed.dp_group_idx_0.optimizer/")
        )
        stored = files.read_object(objects[0]) if objects else []
        inner = attributes(stored[0] if isinstance(stored, list) and stored else stored)
        groups = inner.get("param_groups")
    groups = [dict(group) for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
    step = _step(folder, groups, attributes(inner.get("state")).get("common_step"))
    known = set(map(weights.key_of, weights.names()))
    extra = [name for name in files.tensors if name not in known and not name.startswith(("optimizer.", "chained_"))]
    return _Found(spec, weights, optimizer, common, groups, step, extra)


def _require_moments(files: DcpFiles, optimizer: Mapping[str, Tensors]) -> None:
    """Raise CheckpointError if a checkpoint has tensors of an optimizer, but not both moments in a known form."""
    unread = [name for name in files.tensors if name.startswith(("optimizer.", "chained_"))]
    if unread and not set(MOMENTS) <= optimizer.keys():
        raise CheckpointError(
            f"{files.folder}: its optimizer state lacks {' and '.join(sorted({*MOMENTS} - optimizer.keys()))} in the "
            f"forms that are read here; it has {unread[0]}; import with --weights-only"
        )


def _legacy(folder: Path, request: ImportRequest) -> _Found:
    files = LegacyFiles(folder)
    arguments = attributes(files.common.get("args"))
    rows = files.weights(gated=False)
    if EMBEDDING not in rows.names():
        raise CheckpointError(f"{folder}: has no {EMBEDDING}, so it is not a GPTModel of Megatron-LM")
    spec = _spec(request, arguments, rows.shape(EMBEDDING)[0], files.paths[0, 0] / FILE)
    require_layers(spec, len(rows.names()), str(folder))
    gated = isinstance(spec, LlamaSpec)
    optimizer = files.optimizer(gated=gated) if _wants_optimizer(request, arguments) else {}
    groups = files.param_groups()
    step = _step(folder, groups, files.step()) if optimizer else None
    return _Found(spec, files.weights(gated=gated), optimizer, files.common, groups, step)


def _spec(request: ImportRequest, arguments: Mapping[str, Any], rows: int, where: Path) -> ModelSpec:
    if request.config is not None:
        return spec_of_trainer_config(request.config, "megatron", rows=rows)
    return spec_from_arguments(arguments, rows=rows, where=str(where))


def _wants_optimizer(request: ImportRequest, arguments: Mapping[str, Any]) -> bool:
    return not request.weights_only and arguments.get("optimizer", "adam") == "adam"


def _step(folder: Path, groups: list[dict[str, Any]], stored: Any) -> int | None:
    for value in (stored, *(group.get("step") for group in groups)):
        if value is not None:
            return counted(value, f"{folder}: the optimizer's step")
    return None


@dataclass(frozen=True)
class _Reader:
    """Weights and moments under our names."""

    found: _Found
    sources: Mapping[str, Source]
    folder: Path

    def weight(self, ours: str) -> StoredTensor:
        """A weight: the optimizer's float32 copy of it, if there is one."""
        masters = self.found.optimizer.get("param")
        if masters is None or self.sources[ours].name not in masters.names():
            return self._stored(ours, self.found.weights)
        return self._stored(ours, masters, of=self.found.weights)

    def state(self, ours: str) -> AdamWState:
        """AdamW's state of a weight."""
        first, second = (self._stored(ours, self.found.optimizer[moment]) for moment in MOMENTS)
        if self.found.step is None:
            raise CheckpointError(
                f"{self.folder}: does not say how many updates its moments count; import with --weights-only"
            )
        return AdamWState(exp_avg=first, exp_avg_sq=second, step=self.found.step)

    def _stored(self, ours: str, tensors: Tensors, of: Tensors | None = None) -> StoredTensor:
        source = self.sources[ours]
        if source.name not in tensors.names():
            raise CheckpointError(
                f"{self.folder}: the optimizer state of {source.name} is missing; import with --weights-only"
            )
        where = tensors.where(source.name) + (f" ({source.part})" if source.part else "")
        shape = part_shape(source.part, tensors.shape(source.name), self.found.spec)
        return StoredTensor(where, shape, partial(self._read, source, tensors, of))

    def _read(self, source: Source, tensors: Tensors, of: Tensors | None) -> Tensor:
        whole = tensors.read(source.name)
        if of is not None:
            weight = of.read(source.name)
            if not torch.equal(whole.to(weight.dtype), weight):
                raise CheckpointError(
                    f"{self.folder}: the optimizer's float32 copy of {source.name} rounds to other values than the "
                    "model has: they are of different steps, or a file is damaged. Import with --weights-only to use "
                    "the model's"
                )
        return take_part(source.part, whole, self.found.spec)


def _decayed_group(groups: list[dict[str, Any]]) -> Mapping[str, Any]:
    """The parameter group of the matrices, which has weight decay."""
    return next((group for group in groups if group.get("wd_mult", 1.0) != 0.0), {})


def _settings(groups: list[dict[str, Any]]) -> dict[str, float]:
    group = _decayed_group(groups)
    betas = group.get("betas")
    values: dict[str, Any] = {key: group.get(key) for key in ("weight_decay", "eps")}
    if isinstance(betas, list | tuple) and len(betas) == 2:
        values |= {"beta1": betas[0], "beta2": betas[1]}
    found = {f"optimizer.{key}": plain_number(value) for key, value in values.items()}
    return {key: value for key, value in found.items() if value is not None}


def _not_imported(found: _Found, request: ImportRequest, arguments: Mapping[str, Any]) -> Iterator[str]:
    name = arguments.get("optimizer", "adam")
    if request.weights_only:
        yield "optimizer: as --weights-only says"
    elif name != "adam":
        yield f"optimizer: its state is of {name}; only that of AdamW is read"
    if "opt_param_scheduler" in found.common:
        yield "opt_param_scheduler: the next stage has a schedule of its own"
    if any(name.startswith(_MTP) for name in found.extra):
        yield "mtp: the layers of multi-token prediction, which do not change the logits"


def _notes(found: _Found, request: ImportRequest, arguments: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(found.spec, LlamaSpec) and arguments.get("bias_gelu_fusion", True):
        yield _GELU
    rate = max(plain_number(arguments.get(name)) or 0.0 for name in ("attention_dropout", "hidden_dropout"))
    if rate:
        yield f"trained with dropout {rate:g}; there is no dropout here"
    if any(group.get("decoupled_weight_decay") is False for group in found.groups):
        yield "trained with Adam and an L2 penalty (weight decay that is not decoupled); AdamW decouples it"
    tokens = plain_number(arguments.get("vocab_size"))
    if tokens and tokens < found.spec.vocab_size:
        yield (
            f"the vocabulary has {found.spec.vocab_size:,} rows, of which Megatron-LM added "
            f"{found.spec.vocab_size - int(tokens):,} as padding; they stay"
        )
    if request.weights_only and isinstance(found.weights, DistTensors):
        yield "the weights are those of the model in its own dtype, without the float32 copies of the optimizer"
