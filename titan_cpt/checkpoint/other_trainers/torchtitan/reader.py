"""torchtitan's checkpoints, of its models llama3 and qwen3 (dense): a DCP folder such as outputs/checkpoint/step-1000.

Names and layouts are those of 0.3.0; 0.2's names are read too. The files do not say how many heads the model has, nor
its RoPE: these come from a config.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.other_trainers.dcp_files import DcpFiles
from titan_cpt.checkpoint.other_trainers.rope_layout import halves_from_interleaved
from titan_cpt.checkpoint.other_trainers.torch_files import counted, known_number
from titan_cpt.checkpoint.other_trainers.torchtitan.config import read_spec
from titan_cpt.checkpoint.other_trainers.torchtitan.names import EMBEDDING, TIED_HEADS, is_interleaved, torchtitan_names
from titan_cpt.checkpoint.other_trainers.trained_checkpoint import (
    MOMENTS,
    AdamWState,
    ImportRequest,
    StoredTensor,
    TrainedCheckpoint,
    require_layers,
)
from titan_cpt.errors import CheckpointError
from titan_cpt.models.llama.spec import LlamaSpec

_OLD_NAMES = (("attention.qkv_linear.", "attention."), ("lm_head.", "output."))  # since 0.3, and before
_CONSTANTS = ("freqs_cis", "rope_cache", "rope.cache")  # RoPE's tables, which older versions saved


@dataclass(frozen=True)
class _Source:
    """Where a weight, or its moments, are: a tensor, or the rows of q, k or v in a fused one.

    Attributes:
        name: the tensor's name without a prefix.
        part: "q", "k" or "v" of a fused tensor; "": the whole tensor.
    """

    name: str
    part: str = ""


def open_torchtitan(request: ImportRequest) -> TrainedCheckpoint:
    """Open a checkpoint of torchtitan.

    Raises:
        CheckpointError: it is not a checkpoint of one of these models.
        ConfigError: the config is missing, cannot be read, or describes another model.
    """
    files = DcpFiles(request.path)
    prefix = "model." if f"model.{EMBEDDING}" in files.tensors else ""
    if prefix + EMBEDDING not in files.tensors:
        some = ", ".join(list(files.tensors)[:3])
        raise CheckpointError(
            f"{request.path}: has no {EMBEDDING}, so it is not a language model of torchtitan; it has {some}"
        )
    spec = read_spec(files, prefix, request.config)
    require_layers(spec, len(files.tensors), str(request.path))
    reader = _Reader(files, prefix, spec)
    optimizer = {} if request.weights_only else reader.optimizer()
    state = "optimizer.state."
    known = {prefix + source.name for source in reader.sources.values()} | reader.read_names
    foreign = [name for name in files.tensors if name not in known and not name.endswith(_CONSTANTS)]
    foreign = [name for name in foreign if not name.startswith("optimizer.param_groups.")]  # an LR in a tensor
    if request.weights_only or not optimizer:
        foreign = [name for name in foreign if not name.startswith("optimizer.")]
    if spec.tied:
        foreign = [name for name in foreign if name.removeprefix(prefix) not in TIED_HEADS]
        _require_the_tied_head(files, prefix)
    settings = {} if request.weights_only else reader.settings()
    tokens, counted = reader.tokens()
    skipped = [counted] if counted else []
    if request.weights_only and any(name.startswith(state) for name in files.tensors):
        skipped.append("optimizer: as --weights-only says")
    elif not optimizer and any(name.startswith(state) for name in files.tensors):
        skipped.append("optimizer: its state is not that of AdamW")
    if any(name.startswith("dataloader") for name in files.objects):
        skipped.append("dataloader: the position in the data; the next stage reads its own data")
    if any(name.startswith("lr_scheduler") for name in files.objects):
        skipped.append("lr_scheduler: the next stage has a schedule of its own")
    return TrainedCheckpoint(
        trainer="torchtitan",
        spec=spec,
        weights={ours: reader.weight(ours) for ours in reader.sources},
        optimizer=optimizer,
        foreign=foreign,
        step=reader.number("train_state.step"),
        tokens=tokens,
        next_lr=settings.pop("lr", None),
        settings=settings if optimizer else {},
        not_imported=skipped,
    )


def _require_the_tied_head(files: DcpFiles, prefix: str) -> None:
    """Raise CheckpointError if a model with tied embeddings has a separate head: one of the two would be lost."""
    for head in TIED_HEADS:
        if prefix + head in files.tensors:
            one, other = files.read(prefix + head), files.read(prefix + EMBEDDING)
            if one.shape != other.shape or not torch.equal(one, other):
                raise CheckpointError(
                    f"{files.folder}: {head} differs from {EMBEDDING}, so the embeddings are not tied as the config "
                    "says: correct tie_embeddings, or enable_weight_tying in torchtitan's file"
                )


class _Reader:
    """Our names, and where these weights and moments are in the files.

    Attributes:
        sources: our name -> where the weight is, of those that are there.
        read_names: names of the tensors of the optimizer that `optimizer` found.
    """

    def __init__(self, files: DcpFiles, prefix: str, spec: LlamaSpec) -> None:
        self._files = files
        self._prefix = prefix
        self._spec = spec
        self.sources = dict(self._weights())
        self.read_names: set[str] = set()

    def _weights(self) -> Iterator[tuple[str, _Source]]:
        for ours, new in torchtitan_names(self._spec).items():
            old = new
            for current, before in _OLD_NAMES:
                old = old.replace(current, before)
            theirs = new if self._prefix + new in self._files.tensors else old
            if self._prefix + theirs in self._files.tensors:
                yield ours, _Source(theirs)

    def weight(self, ours: str) -> StoredTensor:
        """A weight in our layout."""
        source = self.sources[ours]
        return self._stored(ours, self._prefix + source.name, source)

    def optimizer(self) -> dict[str, AdamWState]:
        """AdamW's state of every weight that has one."""
        found = {}
        for ours, source in self.sources.items():
            where = self._state_of(source)
            if where is None:
                continue
            key = f"optimizer.state.{where.name}"
            self.read_names |= {f"{key}.{name}" for name in (*MOMENTS, "step")}
            first, second = (self._stored(ours, f"{key}.{moment}", where) for moment in MOMENTS)
            step = counted(self._stored_value(f"{key}.step"), f"{self._files.folder}: {key}.step")
            found[ours] = AdamWState(exp_avg=first, exp_avg_sq=second, step=step)
        return found

    def _state_of(self, source: _Source) -> _Source | None:
        """Where the moments of a weight are. torchtitan splits a fused QKV weight when it saves it, not its moments."""
        fused = source.name.replace(".wq.", ".wqkv.").replace(".wk.", ".wqkv.").replace(".wv.", ".wqkv.")
        part = source.name.split(".")[-2].removeprefix("w") if fused != source.name else ""
        for where in (source, _Source(fused, part)):
            if all(f"optimizer.state.{where.name}.{moment}" in self._files.tensors for moment in MOMENTS):
                return where
        return None

    def settings(self) -> dict[str, float]:
        """Dotted keys of our [optimizer], and `lr`, the LR of torchtitan's next step; of the embedding's group."""
        group = f"optimizer.param_groups.{EMBEDDING}"
        values: dict[str, Any] = {
            key: self._stored_value(f"{group}.{key}") for key in ("lr", "betas", "eps", "weight_decay")
        }
        betas = values.pop("betas")
        if isinstance(betas, tuple | list) and len(betas) == 2:
            values |= {"beta1": betas[0], "beta2": betas[1]}
        return {
            key if key == "lr" else f"optimizer.{key}": number
            for key, value in values.items()
            if (number := known_number(value)) is not None
        }

    def number(self, name: str) -> int | None:
        """A count, which is stored as an object, or as a tensor without dimensions; None if there is none."""
        number = known_number(self._stored_value(name))
        return None if number is None else int(number)

    def _stored_value(self, name: str) -> Any:
        """An object, or a tensor without dimensions; None if there is none."""
        if name in self._files.tensors and self._files.tensors[name].shape == ():
            return self._files.read(name)
        return self._files.read_object(name) if name in self._files.objects else None

    def tokens(self) -> tuple[int | None, str | None]:
        """The tokens that trained the weights, or why the number in the files is another one."""
        counted = self.number("train_state.ntokens_seen")
        if counted is None:
            return None, None
        files = {shard.file for entry in self._files.tensors.values() for shard in entry.shards}
        if all(file.startswith("__0_") for file in files):
            return counted, None
        return None, (
            f"train_state.ntokens_seen = {counted:,}: torchtitan counts the tokens of one data-parallel rank; "
            "multiply it by their number"
        )

    def _stored(self, ours: str, name: str, source: _Source) -> StoredTensor:
        """The tensor `name` in our layout: a part of a fused one, and q and k in our order of features."""
        spec = self._spec
        shape = self._files.tensors[name].shape
        rows = (spec.heads + 2 * spec.kv_heads) * spec.head_width
        if source.part and shape and shape[0] == rows:
            part = 1 if source.part != "q" else spec.heads // spec.kv_heads
            shape = (shape[0] * part // (spec.heads // spec.kv_heads + 2), *shape[1:])
        where = f"{name} ({source.part})" if source.part else name
        return StoredTensor(where, shape, partial(self._read, name, source.part, is_interleaved(ours, spec)))

    def _read(self, name: str, part: str, interleaved: bool) -> Tensor:
        tensor = self._files.read(name)
        spec = self._spec
        if part:
            shared = spec.heads // spec.kv_heads
            groups = tensor.reshape(-1, shared + 2, spec.head_width, *tensor.shape[1:])
            chosen = {"q": slice(0, shared), "k": slice(shared, shared + 1), "v": slice(shared + 1, shared + 2)}[part]
            tensor = groups[:, chosen].reshape(-1, *tensor.shape[1:])
        return halves_from_interleaved(tensor, spec.head_width) if interleaved else tensor
