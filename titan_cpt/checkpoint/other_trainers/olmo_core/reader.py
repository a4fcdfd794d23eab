"""OLMo-core's checkpoints, of dense models: a folder such as step1000, with model_and_optim/, train/ and config.json.

Names and layouts are those of 3.0.0. model_and_optim is a DCP checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.other_trainers.dcp_files import DcpFiles
from titan_cpt.checkpoint.other_trainers.dcp_metadata import METADATA
from titan_cpt.checkpoint.other_trainers.olmo_core.config import (
    CONFIG,
    OlmoCoreModel,
    read_olmo_core_json,
    read_olmo_core_model,
)
from titan_cpt.checkpoint.other_trainers.rope_layout import halves_from_interleaved
from titan_cpt.checkpoint.other_trainers.torch_files import counted, load_torch_file, plain_number, whole_number
from titan_cpt.checkpoint.other_trainers.trained_checkpoint import (
    MOMENTS,
    AdamWState,
    ImportRequest,
    StoredTensor,
    TrainedCheckpoint,
    require_layers,
)
from titan_cpt.common.reading import is_there, matching
from titan_cpt.errors import CheckpointError

_TENSORS = "model_and_optim"
_TRAINER = "train"
_EMBEDDING = "embeddings.weight"
_HEAD = "lm_head.w_out.weight"
_NORM = "lm_head.norm.weight"
_MATRIX = "blocks.0.feed_forward.w1.weight"
_BLOCK = {
    "attention_norm": "attention_norm",
    "attention.q": "attention.w_q",
    "attention.k": "attention.w_k",
    "attention.v": "attention.w_v",
    "attention.out": "attention.w_out",
    "attention.q_norm": "attention.q_norm",
    "attention.k_norm": "attention.k_norm",
    "mlp_norm": "feed_forward_norm",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
}
_OLMO = {"attention_norm": "post_attention_norm", "mlp_norm": "post_mlp_norm"}  # after attention and MLP
_FUSED = "attention.w_qkv"


def open_olmo_core(request: ImportRequest) -> TrainedCheckpoint:
    """Open a checkpoint of OLMo-core.

    Raises:
        CheckpointError: it is not a checkpoint of one of these models.
        ConfigError: the config is missing, cannot be read, or describes another model.
    """
    files = DcpFiles(_tensors_folder(request.path))
    embedding = files.tensors.get(f"model.{_EMBEDDING}")
    if embedding is None or len(embedding.shape) != 2:
        some = ", ".join(list(files.tensors)[:3]) or "no tensors"
        raise CheckpointError(f"{files.folder}: has no model.{_EMBEDDING}, so it is not of OLMo-core; it has {some}")
    folder = files.folder.parent if files.folder.name == _TENSORS else files.folder
    config_file = request.config or folder / CONFIG
    model = read_olmo_core_model(config_file, rows=embedding.shape[0])
    require_layers(model.spec, len(files.tensors), str(files.folder))
    config = {} if config_file.suffix == ".toml" else read_olmo_core_json(config_file)
    trainer, skipped = _trainer_state(folder)
    step = _step(trainer, folder)
    reader, optim = _Reader(files, model), _Settings(files)
    found = _Optimizer() if request.weights_only else _optimizer(reader, optim, config, step)
    if request.weights_only and any(name.startswith("optim.state.") for name in files.tensors):
        skipped.append("optim: as --weights-only says")
    known = {f"model.{source.name}" for source in reader.sources.values()} | reader.read_names
    known |= {f"model.{_HEAD}"} if model.spec.tied else set()
    loader = trainer.get("data_loader")
    return TrainedCheckpoint(
        trainer="OLMo-core",
        spec=model.spec,
        weights={ours: reader.stored(ours, f"model.{source.name}") for ours, source in reader.sources.items()},
        optimizer=found.states,
        foreign=[n for n in files.tensors if n not in known and (found.states or not n.startswith("optim."))],
        step=step,
        tokens=whole_number(trainer.get("global_train_tokens_seen")),
        lr=optim.number(_EMBEDDING, "lr"),
        settings=found.settings,
        seq_len=whole_number(loader.get("sequence_length")) if isinstance(loader, dict) else None,
        not_imported=skipped,
        notes=[*found.notes, *_data_notes(config)],
    )


@dataclass(frozen=True)
class _Source:
    """Where a weight is: a tensor, or the rows of q, k or v in a fused one."""

    name: str
    part: str = ""


class _Reader:
    """Our names, and where these weights and moments are in the files.

    Attributes:
        sources: our name -> where the weight is, of those that are there.
        read_names: names of the tensors of the optimizer that `optimizer` found.
    """

    def __init__(self, files: DcpFiles, model: OlmoCoreModel) -> None:
        self._files = files
        self._spec = model.spec
        self._interleaved = model.interleaved
        self.sources = {ours: source for ours, source in self._named() if f"model.{source.name}" in files.tensors}
        self.read_names: set[str] = set()

    def _named(self) -> Iterator[tuple[str, _Source]]:
        yield "embedding.weight", _Source(_EMBEDDING)
        for layer in range(self._spec.layers):
            fused = f"blocks.{layer}.{_FUSED}.weight"
            for llamas, theirs in _BLOCK.items():
                ours = _OLMO.get(llamas, llamas) if self._spec.family == "olmo" else llamas
                part = ours.rpartition(".")[2]
                if part in ("q", "k", "v") and f"model.{fused}" in self._files.tensors:
                    yield f"blocks.{layer}.{ours}.weight", _Source(fused, part)
                else:
                    yield f"blocks.{layer}.{ours}.weight", _Source(f"blocks.{layer}.{theirs}.weight")
        yield "final_norm.weight", _Source(_NORM)
        if not self._spec.tied:
            yield "head.weight", _Source(_HEAD)

    def stored(self, ours: str, name: str) -> StoredTensor:
        """A tensor of the files, a weight or a moment, in our layout."""
        part = self.sources[ours].part
        shape = self._files.tensors[name].shape
        rows = self._rows()
        if part and shape and shape[0] == sum(rows.values()):
            shape = (rows[part], *shape[1:])
        return StoredTensor(f"{name} ({part})" if part else name, shape, partial(self._read, ours, name))

    def _rows(self) -> dict[str, int]:
        spec = self._spec
        return {"q": spec.attention_width, "k": spec.kv_width, "v": spec.kv_width}

    def _read(self, ours: str, name: str) -> Tensor:
        tensor = self._files.read(name)
        source = self.sources[ours]
        if source.part:
            tensor = dict(zip("qkv", torch.split(tensor, list(self._rows().values())), strict=True))[source.part]
        if self._interleaved and ours.split(".")[-2] in ("q", "k", "q_norm", "k_norm"):
            return halves_from_interleaved(tensor, self._spec.attention_width // self._spec.heads)
        return tensor

    def optimizer(self) -> dict[str, AdamWState]:
        """AdamW's state of every weight that has one; that of SkipStepAdamW is the same."""
        found = {}
        for ours, source in self.sources.items():
            key = f"optim.state.{source.name}"
            if not all(f"{key}.{name}" in self._files.tensors for name in (*MOMENTS, "step")):
                continue  # the writer names weights without a state
            self.read_names |= {f"{key}.{name}" for name in (*MOMENTS, "step")}
            first, second = (self.stored(ours, f"{key}.{moment}") for moment in MOMENTS)
            step = counted(self._files.read(f"{key}.step"), f"{self._files.folder}: {key}.step")
            found[ours] = AdamWState(exp_avg=first, exp_avg_sq=second, step=step)
        return found


class _Settings:
    """The hyperparameters of the optimizer, of each parameter: stored under its name, or under that of its group."""

    def __init__(self, files: DcpFiles) -> None:
        self._files = files
        self._groups: dict[str, str] = {}
        for name in files.objects:
            if number := re.fullmatch(r"optim\.param_groups\.(\d+)\.params", name):
                listed = files.read_object(name)
                self._groups |= {str(each): number[1] for each in listed} if isinstance(listed, list | tuple) else {}

    def number(self, parameter: str, key: str) -> float | None:
        """A hyperparameter of a parameter; None if it is not stored."""
        return plain_number(self._value(parameter, key))

    def betas(self) -> tuple[float | None, float | None]:
        """AdamW's decay rates."""
        found = self._value(_EMBEDDING, "betas")
        first, second = found if isinstance(found, tuple | list) and len(found) == 2 else (None, None)
        return plain_number(first), plain_number(second)

    def ours(self) -> dict[str, float]:
        """Dotted keys of our [optimizer]; the weight decay is that of the blocks' matrices."""
        beta1, beta2 = self.betas()
        values = {"beta1": beta1, "beta2": beta2, "eps": self.number(_EMBEDDING, "eps")}
        values["weight_decay"] = self.number(_MATRIX, "weight_decay")
        return {f"optimizer.{key}": value for key, value in values.items() if value is not None}

    def _value(self, parameter: str, key: str) -> Any:
        for group in (parameter, self._groups.get(parameter)):
            name = f"optim.param_groups.{group}.{key}"
            if name in self._files.objects:
                return self._files.read_object(name)
            if name in self._files.tensors and self._files.tensors[name].shape == ():
                return float(self._files.read(name))  # a compiled optimizer has its LR in a tensor
        return None


def _tensors_folder(path: Path) -> Path:
    """The DCP folder in a checkpoint; the path itself if it is one."""
    if is_there(path / METADATA):
        return path
    if is_there(path / _TENSORS / METADATA):
        return path / _TENSORS
    found = [each.parent.parent for each in matching(path, "*", _TENSORS, METADATA)]
    if found:
        shown = ", ".join(str(each) for each in found[-3:])
        raise CheckpointError(
            f"{path}: has no {_TENSORS}/{METADATA}; give one of the checkpoints in it: "
            f"{'..., ' if found[3:] else ''}{shown}"
        )
    return path / _TENSORS if is_there(path / _TENSORS) else path  # DcpFiles says what is wrong


def _trainer_state(folder: Path) -> tuple[Mapping[str, Any], list[str]]:
    """What the trainer saved of itself, and what of it is not imported."""
    path = folder / _TRAINER / "rank0.pt"
    if not is_there(path):
        return {}, []
    try:
        state = load_torch_file(path)
    except CheckpointError as error:
        return {}, [f"{_TRAINER}/: {error}"]
    return state if isinstance(state, dict) else {}, [
        f"{_TRAINER}/: the position in the data, random numbers and callbacks; the next stage has its own"
    ]


def _step(trainer: Mapping[str, Any], folder: Path) -> int | None:
    step = whole_number(trainer.get("global_step"))
    named = re.fullmatch(r"step(\d+)", folder.name)
    return int(named[1]) if step is None and named else step


@dataclass(frozen=True)
class _Optimizer:
    """AdamW's state, what our [optimizer] needs to continue it, and what the user should know of it."""

    states: Mapping[str, AdamWState] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


def _optimizer(reader: _Reader, settings: _Settings, config: Mapping[str, Any], step: int | None) -> _Optimizer:
    states = reader.optimizer()
    if not states:
        return _Optimizer()
    found = _Optimizer(states, settings.ours())
    if not any(state.step for state in states.values()):
        found = _without_counts(found, step)
    if not found.states:
        return found
    counts = {state.step for state in states.values()}
    return replace(found, notes=[*found.notes, *_optimizer_notes(settings, config, counts, step)])


def _without_counts(found: _Optimizer, step: int | None) -> _Optimizer:
    """The state of a SkipStepAdamW that never counts its steps, with the trainer's count; and how to continue it.

    Its update divides by 1 - beta, the correction of a first step, in every step:

        p <- p - lr weight_decay p - lr (m / (1 - beta1)) / (sqrt(v / (1 - beta2)) + eps)

    which is AdamW's update without a bias correction, with the LR times f = sqrt(1 - beta2) / (1 - beta1), the eps
    times sqrt(1 - beta2), and the weight decay divided by f. After many steps AdamW's correction is 1.
    """
    beta1, beta2 = found.settings.get("optimizer.beta1"), found.settings.get("optimizer.beta2")
    if not step or beta1 is None or beta2 is None or not (beta1 < 1 and beta2 < 1):
        return _Optimizer(
            notes=["the optimizer counts 0 updates, and how many there were is unknown: no state imported"]
        )
    root = math.sqrt(1 - beta2)
    factor = root / (1 - beta1)
    settings = dict(found.settings)
    for key, scale in {"optimizer.eps": root, "optimizer.weight_decay": 1 / factor}.items():
        if key in settings:
            settings[key] *= scale
    return _Optimizer(
        {name: replace(state, step=step) for name, state in found.states.items()},
        settings,
        [
            "the optimizer counts 0 updates: it is a SkipStepAdamW without step_increment_bugfix, which corrects the "
            f"bias in every step as in a first one. To continue it, multiply its LR by {factor:.6g}; eps and "
            "weight_decay are given below as they continue it, and step counts as the trainer's"
        ],
    )


def _optimizer_notes(
    settings: _Settings, config: Mapping[str, Any], counts: set[int], step: int | None
) -> Iterator[str]:
    """What OLMo-core's optimizer does otherwise."""
    matrices, embedding, norms = (settings.number(name, "weight_decay") for name in (_MATRIX, _EMBEDDING, _NORM))
    if matrices and embedding == 0.0:
        yield (
            f"OLMo-core does not decay the embedding; here weight_decay {matrices:g} applies to it, so that it is "
            f"smaller by the factor 1 - LR x {matrices:g} after a step"
        )
    if norms:
        yield (
            f"OLMo-core decays norms with weight_decay {norms:g}; here they are not decayed, so that each of them is "
            f"larger by the factor 1 + LR x {norms:g} after a step"
        )
    if step is not None and counts == {step + 1}:
        yield f"AdamW counts {step + 1:,} updates: torch counted one when it saved the checkpoint of step 0"
    options = config.get("train_module")
    options = options if isinstance(options, Mapping) else {}
    optim = options.get("optim")
    if isinstance(optim, Mapping) and "skip" in str(optim.get("_CLASS_", "")).lower():
        yield "SkipStepAdamW leaves out steps with unusual losses or gradients; see training.on_loss_spike"
    norm = plain_number(options.get("max_grad_norm"))
    yield (
        f"gradients are clipped to max_grad_norm = {norm:g}: set training.max_norm"
        if norm
        else (
            "OLMo-core did not clip gradients; here training.max_norm always does: set it far above the gradient norms"
        )
    )
    if options.get("z_loss_multiplier"):
        yield f"the loss has a z-loss, z_loss_multiplier = {options['z_loss_multiplier']:g}; there is none here"


def _data_notes(config: Mapping[str, Any]) -> Iterator[str]:
    dataset = config.get("dataset")
    if isinstance(dataset, Mapping) and dataset.get("generate_doc_lengths") is True:
        yield "tokens attended only to their own document (generate_doc_lengths): set training.document_mask = true"
