"""litgpt's checkpoints, of its models with GptNeoxMLP or LLaMAMLP: a folder with lit_model.pth and model_config.yaml.

`litgpt pretrain` saves weights, AdamW's state and counts in lit_model.pth; other commands save only weights. The names
and layouts are those of 0.5.13; the interleaved QKV weight of older versions is read too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.other_trainers.litgpt.config import MODEL_CONFIG, read_litgpt_spec
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
from titan_cpt.convert.reading import read_files
from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.llama.spec import LlamaSpec
from titan_cpt.models.spec import ModelSpec

WEIGHTS = "lit_model.pth"
HYPERPARAMETERS = "hyperparameters.yaml"
_EMBEDDING = "transformer.wte.weight"
_HEAD = "lm_head.weight"
_LLAMA_BLOCK = {
    "attention_norm": "norm_1",
    "attention.out": "attn.proj",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "mlp_norm": "norm_2",
    "mlp.gate": "mlp.fc_1",
    "mlp.up": "mlp.fc_2",
    "mlp.down": "mlp.proj",
}
_NEOX_BLOCK = {
    "attention_norm": "norm_1",
    "attention.out": "attn.proj",
    "mlp_norm": "norm_2",
    "mlp.up": "mlp.fc",
    "mlp.down": "mlp.proj",
}
_PREFIXES = ("_orig_mod.", "module.", "_forward_module.")  # of torch.compile and of wrappers


def open_litgpt(request: ImportRequest) -> TrainedCheckpoint:
    """Open a checkpoint of litgpt.

    Raises:
        CheckpointError: it is not a checkpoint of one of these models, or it is damaged.
        ConfigError: the config is missing, cannot be read, or describes another model.
    """
    file = _weights_file(request.path)
    content = load_torch_file(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a dict of weights")
    stored = content["model"] if isinstance(content.get("model"), dict) else content
    weights = {_plain_name(str(name)): tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}
    if _EMBEDDING not in weights or weights[_EMBEDDING].ndim != 2:
        some = ", ".join(list(weights)[:3]) or "no tensors"
        raise CheckpointError(f"{file}: has no {_EMBEDDING}, so it is not a model of litgpt; it has {some}")
    options = _hyperparameters(file.parent)
    config = _config(request, file)
    tied = _is_tied(weights, options, file)
    spec = read_litgpt_spec(config, rows=weights[_EMBEDDING].shape[0], tied=tied)
    require_layers(spec, len(weights), str(file))
    reader = _Reader(weights, spec)
    optimizer, skipped = _optimizer(request, reader, content if stored is not content else {})
    group = _only_group(content["optimizer"]) if optimizer else {}
    return TrainedCheckpoint(
        trainer="litgpt",
        spec=spec,
        weights={ours: reader.stored(ours, weights, source.name) for ours, source in reader.sources.items()},
        optimizer=optimizer,
        foreign=[name for name in weights if name not in reader.names and not (tied and name == _HEAD)],
        step=whole_number(content.get("step_count")),
        tokens=_tokens(content, options),
        lr=plain_number(group.get("lr")),
        settings=_settings(group),
        seq_len=whole_number(options.get("train.max_seq_length")),
        not_imported=skipped,
        notes=[*_dtype_notes(weights), *_optimizer_notes(group, options)],
    )


@dataclass(frozen=True)
class _Source:
    """Where a weight is: a tensor, or the rows of q, k or v in a fused one ("qkv": all, in our order)."""

    name: str
    part: str = ""


class _Reader:
    """Our names, and where these weights are in the file.

    Attributes:
        sources: our name -> where the weight is, of those that are there.
        names: litgpt's names of these.
    """

    def __init__(self, weights: Mapping[str, Tensor], spec: ModelSpec) -> None:
        self._weights = weights
        self._spec = spec
        self.sources = {ours: source for ours, source in self._named() if source.name in weights}
        self.names = {source.name for source in self.sources.values()}

    def _named(self) -> Iterator[tuple[str, _Source]]:
        llama = isinstance(self._spec, LlamaSpec)
        yield "embedding.weight", _Source(_EMBEDDING)
        for layer in range(self._spec.layers):
            theirs = f"transformer.h.{layer}"
            for kind in ("weight", "bias"):
                for our_name, name in (_LLAMA_BLOCK if llama else _NEOX_BLOCK).items():
                    yield f"blocks.{layer}.{our_name}.{kind}", _Source(f"{theirs}.{name}.{kind}")
                qkv = f"{theirs}.attn.qkv.{kind}"
                fused = qkv if qkv in self._weights else f"{theirs}.attn.attn.{kind}"  # since 0.5.5, and before
                for part in ("q", "k", "v") if llama else ("qkv",):
                    yield f"blocks.{layer}.attention.{part}.{kind}", _Source(fused, part)
        for kind in ("weight", "bias"):
            yield f"final_norm.{kind}", _Source(f"transformer.ln_f.{kind}")
        if not self._spec.tied:
            yield "head.weight", _Source(_HEAD)

    def stored(self, ours: str, tensors: Mapping[str, Tensor], where: str) -> StoredTensor:
        """One of these tensors, a weight or a moment, in our layout; `where` is its name in messages."""
        source = self.sources[ours]
        tensor = tensors[source.name]
        shape = tuple(tensor.shape)
        heads, groups, head_width = self._heads()
        if source.part in ("q", "k", "v") and shape and shape[0] == (heads + 2 * groups) * head_width:
            shape = ((heads if source.part == "q" else groups) * head_width, *shape[1:])
        shown = where if not source.part else f"{where} ({source.part})"
        return StoredTensor(shown, shape, partial(self._read, tensor, source))

    def _heads(self) -> tuple[int, int, int]:
        spec = self._spec
        return spec.heads, spec.key_value_heads, spec.attention_width // spec.heads

    def _read(self, tensor: Tensor, source: _Source) -> Tensor:
        if not source.part:
            return tensor
        heads, groups, head_width = self._heads()
        rest = tensor.shape[1:]
        if ".attn.attn." in source.name:  # group by group: its queries, its key, its value
            if source.part == "qkv":
                return tensor
            shared = heads // groups
            rows = tensor.reshape(groups, shared + 2, head_width, *rest)
            chosen = {"q": slice(0, shared), "k": slice(shared, shared + 1), "v": slice(shared + 1, None)}
            return rows[:, chosen[source.part]].reshape(-1, *rest)
        q, k, v = torch.split(tensor, [heads * head_width, groups * head_width, groups * head_width])
        if source.part == "qkv":  # ours: head by head
            return torch.stack([each.reshape(heads, head_width, *rest) for each in (q, k, v)], 1).reshape(tensor.shape)
        return {"q": q, "k": k, "v": v}[source.part]

    def optimizer(self, found: Any) -> tuple[dict[str, AdamWState], str]:
        """AdamW's state of every weight; or none, and why."""
        states = self._states_by_name(found)
        if isinstance(states, str):
            return {}, states
        other = {key for state in states.values() for key in state} ^ {*MOMENTS, "step"}
        if other:
            return {}, f"it is not AdamW, whose state differs in {', '.join(sorted(map(str, other)))}"
        moments = {
            moment: {name: state[moment] for name, state in states.items() if isinstance(state[moment], Tensor)}
            for moment in MOMENTS
        }
        result = {}
        for ours, source in self.sources.items():
            if any(source.name not in moments[moment] for moment in MOMENTS):
                continue  # the writer names weights without a state
            first, second = (self.stored(ours, moments[m], f"{m} of {source.name}") for m in MOMENTS)
            step = counted(states[source.name]["step"], f"the optimizer's step of {source.name}")
            result[ours] = AdamWState(exp_avg=first, exp_avg_sq=second, step=step)
        return result, ""

    def _states_by_name(self, found: Any) -> dict[str, Mapping[str, Any]] | str:
        """litgpt's name -> state. A single process numbers the weights in the model's order; FSDP names them."""
        try:
            states, groups = found["state"], found["param_groups"]
            listed = [key for group in groups for key in group["params"]]
            if any(group.get("weight_decay") and group.get("decoupled_weight_decay") is False for group in groups):
                return "it is Adam with L2 regularization, not AdamW"
        except (KeyError, TypeError):
            return "not in the form of torch's optimizers"
        if all(isinstance(key, str) for key in listed):
            return {_plain_name(key): state for key, state in states.items()}
        storages: dict[int, str] = {}
        for name, tensor in self._weights.items():  # a tied weight is one parameter
            storages.setdefault(tensor.data_ptr(), name)
        names = list(storages.values())
        if sorted(listed) != list(range(len(names))):
            return f"it has {len(listed)} parameters, the model {len(names)}"
        tied = {name: names[names.index(storages[tensor.data_ptr()])] for name, tensor in self._weights.items()}
        by_name = {names[key]: state for key, state in states.items()}
        return {name: by_name[first] for name, first in tied.items() if first in by_name}


def _optimizer(
    request: ImportRequest, reader: _Reader, content: Mapping[str, Any]
) -> tuple[dict[str, AdamWState], list[str]]:
    """The optimizer's state of every weight, and what is not imported of a file of `litgpt pretrain`."""
    found = content.get("optimizer")
    states: dict[str, AdamWState] = {}
    skipped = []
    if request.weights_only and found is not None:
        skipped.append("optimizer: as --weights-only says")
    elif found is not None:
        states, why = reader.optimizer(found)
        skipped += [f"optimizer: {why}"] if why else []
    if "train_dataloader" in content:
        skipped.append("train_dataloader: the position in the data; the next stage reads its own data")
    return states, skipped


def _weights_file(path: Path) -> Path:
    """lit_model.pth of a folder, or the file itself."""
    file = path if path.suffix == ".pth" else path / WEIGHTS
    if file.is_file():
        return file
    if file.is_dir():
        raise CheckpointError(
            f"{file}: is a folder, a sharded checkpoint of Lightning Fabric: make one file of it with "
            f"`fabric consolidate {file}`, or save again with `litgpt pretrain`, which writes one file"
        )
    if not is_there(path):
        raise CheckpointError(f"{path}: no such folder; give the folder of one checkpoint, with a {WEIGHTS}")
    found = [each.parent for each in matching(path, "*", WEIGHTS)]
    if found:
        shown = ", ".join(str(each) for each in found[-3:])
        raise CheckpointError(
            f"{path}: has no {WEIGHTS}; give one of the checkpoints in it: {'..., ' if found[3:] else ''}{shown}"
        )
    raise CheckpointError(f"{path}: has no {WEIGHTS}, so it is not a checkpoint of litgpt")


def _config(request: ImportRequest, file: Path) -> Path:
    config = request.config or file.parent / MODEL_CONFIG
    if not is_there(config):
        raise ConfigError(
            f"{config}: no such file. It describes the model: give it with --config FILE, or a TOML file with [model]"
        )
    return config


def _hyperparameters(folder: Path) -> Mapping[str, Any]:
    """The options of `litgpt pretrain`, dotted; empty if they were not saved."""
    path = folder / HYPERPARAMETERS
    return read_files([path], "litgpt")[1] if is_there(path) else {}


def _is_tied(weights: Mapping[str, Tensor], options: Mapping[str, Any], file: Path) -> bool:
    """Whether embedding and head are one weight: `train.tie_embeddings`, or one storage in the file."""
    embedding, head = weights[_EMBEDDING], weights.get(_HEAD)
    if head is None or head.data_ptr() == embedding.data_ptr():
        return True
    if options.get("train.tie_embeddings") is not True:
        return False
    if not torch.equal(head, embedding):
        raise CheckpointError(
            f"{file}: {HYPERPARAMETERS} says train.tie_embeddings, but {_HEAD} and {_EMBEDDING} differ: the files are "
            "not of one checkpoint"
        )
    return True


def _plain_name(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name


def _only_group(optimizer: Any) -> Mapping[str, Any]:
    """The hyperparameters of the optimizer; litgpt has one group of parameters."""
    groups: Sequence[Mapping[str, Any]] = optimizer["param_groups"]
    return groups[0] if len(groups) == 1 else {}


def _settings(group: Mapping[str, Any]) -> dict[str, float]:
    """Dotted keys of our [optimizer]."""
    betas = group.get("betas")
    first, second = betas if isinstance(betas, tuple | list) and len(betas) == 2 else (None, None)
    values = {"beta1": first, "beta2": second, "eps": group.get("eps"), "weight_decay": group.get("weight_decay")}
    return {f"optimizer.{key}": number for key, value in values.items() if (number := plain_number(value)) is not None}


def _tokens(content: Mapping[str, Any], options: Mapping[str, Any]) -> int | None:
    """Tokens that trained the weights: micro-batches of one process x their tokens x processes."""
    names = ("train.micro_batch_size", "train.max_seq_length", "devices", "num_nodes")
    numbers = [whole_number(content.get("iter_num")), *(whole_number(options.get(name)) for name in names)]
    product = 1
    for number in numbers:
        if number is None:
            return None
        product *= number
    return product


def _dtype_notes(weights: Mapping[str, Tensor]) -> Iterator[str]:
    dtype = weights[_EMBEDDING].dtype
    if dtype != torch.float32:
        yield (
            f"the weights are in {str(dtype).removeprefix('torch.')} and are stored in float32: litgpt trained them "
            "with precision bf16-true or 16-true, where small updates are lost; here the weights stay in float32"
        )


def _optimizer_notes(group: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    decay = plain_number(group.get("weight_decay"))
    if decay:
        yield (
            f"litgpt decays every parameter with weight_decay {decay:g}; here norms and biases are not decayed, so "
            f"that each of them is larger by the factor 1 + LR x {decay:g} after a step"
        )
    norm = plain_number(options.get("train.max_norm"))
    if norm is not None and group:
        yield f"litgpt clips gradients to train.max_norm = {norm:g}: set training.max_norm"
