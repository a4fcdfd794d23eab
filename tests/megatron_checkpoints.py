"""Checkpoints as Megatron-LM writes them, made without it: fused weights, ranks, stacked layers, flat buffers.

The forms are those of megatron-core 0.16.1, whose own checkpoints scripts/other_trainers/megatron.sh compares.
"""

from __future__ import annotations

import argparse
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.optim import AdamW

from titan_cpt.models.spec import ModelSpec

GROUP = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": True}
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
ROWS = (
    *("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias"),
    *("linear_fc1.weight", "linear_fc1.bias"),
)
TE_ORDER = ("linear_proj", "linear_qkv", "q_layernorm", "k_layernorm", "linear_fc1", "linear_fc2")
LOCAL_ORDER = (
    *("input_layernorm", "linear_proj", "linear_qkv", "q_layernorm", "k_layernorm"),
    *("pre_mlp_layernorm", "linear_fc1", "linear_fc2"),
)


class ModelType(enum.Enum):
    """An enum, as Megatron-LM has one among its arguments."""

    encoder_or_decoder = 1


def arguments(spec: ModelSpec, **more: Any) -> argparse.Namespace:
    """Megatron-LM's arguments for this model."""
    llama = spec.family == "llama"
    values = {
        "num_layers": spec.layers, "hidden_size": spec.width, "num_attention_heads": spec.heads,
        "ffn_hidden_size": spec.mlp_width, "swiglu": llama, "add_bias_linear": not llama, "norm_epsilon": spec.norm_eps,
        "normalization": "RMSNorm" if llama else "LayerNorm", "position_embedding_type": "rope",
        "rotary_base": int(spec.rope_base), "rotary_percent": 1.0 if llama else spec.rotary_fraction,
        "untie_embeddings_and_output_weights": not spec.tied, "group_query_attention": llama,
        "num_query_groups": spec.key_value_heads, "kv_channels": spec.head_width, "seq_length": 8,
        "add_qkv_bias": llama and spec.qkv_bias, "qk_layernorm": llama and spec.qk_norm, "optimizer": "adam",
        "consumed_train_samples": 4, "model_type": ModelType.encoder_or_decoder,
    }  # fmt: skip
    return argparse.Namespace(**values | more)


def whole_tensors(ours: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Our weights, or a moment of them, as the tensors of the whole model, under the names of its TE layers."""
    names = {"embedding.weight": "embedding.word_embeddings.weight", "head.weight": "output_layer.weight"}
    names |= {f"final_norm.{kind}": f"decoder.final_layernorm.{kind}" for kind in ("weight", "bias")}
    found = {names[name]: tensor.detach() for name, tensor in ours.items() if name in names}
    for layer in range(spec.layers):
        block = {name.split(".", 2)[2]: t.detach() for name, t in ours.items() if name.startswith(f"blocks.{layer}.")}
        for name, tensor in _block(block, spec).items():
            found[f"decoder.layers.{layer}.{name}"] = tensor.contiguous()
    return found


def _block(block: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    found = {}
    for kind in ("weight", "bias"):
        pairs = {"attention_norm": "self_attention.linear_qkv.layer_norm_", "mlp_norm": "mlp.linear_fc1.layer_norm_"}
        pairs |= {"attention.out": "self_attention.linear_proj.", "mlp.down": "mlp.linear_fc2."}
        pairs |= {"attention.qkv": "self_attention.linear_qkv.", "attention.q_norm": "self_attention.q_layernorm."}
        pairs |= {"attention.k_norm": "self_attention.k_layernorm."}
        if spec.family == "gpt_neox":
            pairs["mlp.up"] = "mlp.linear_fc1."
        found |= {theirs + kind: block[f"{mine}.{kind}"] for mine, theirs in pairs.items() if f"{mine}.{kind}" in block}
        if f"attention.q.{kind}" in block:
            found[f"self_attention.linear_qkv.{kind}"] = _fused(*(block[f"attention.{p}.{kind}"] for p in "qkv"), spec)
    if spec.family == "llama":
        found["mlp.linear_fc1.weight"] = torch.cat([block["mlp.gate.weight"], block["mlp.up.weight"]])
    return found


def _fused(q: Tensor, k: Tensor, v: Tensor, spec: ModelSpec) -> Tensor:
    """For each key/value head: the query heads that share it, then its key head, then its value head."""
    width, shared = spec.head_width, spec.heads // spec.key_value_heads
    rows = []
    for head in range(spec.key_value_heads):
        rows.append(q[head * shared * width : (head + 1) * shared * width])
        rows += [k[head * width : (head + 1) * width], v[head * width : (head + 1) * width]]
    return torch.cat(rows)


def of_rank(name: str, tensor: Tensor, rank: int, tp: int, *, gated: bool) -> Tensor:
    """A tensor-parallel rank's part of a whole tensor."""
    if gated and "linear_fc1.weight" in name:
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
    if name.endswith(ROWS):
        return tensor.chunk(tp)[rank].contiguous()
    return tensor.chunk(tp, 1)[rank].contiguous() if name.endswith(COLUMNS) else tensor


def stage_names(
    whole: Mapping[str, Tensor], stage: int, stages: int, spec: ModelSpec, *, local: bool
) -> dict[str, str]:
    """A stage's parameters in the order of its modules: name there -> name in the whole model."""
    count = spec.layers // stages
    names = {"embedding.word_embeddings.weight": "embedding.word_embeddings.weight"} if stage == 0 else {}
    for layer in range(count):
        there = f"decoder.layers.{stage * count + layer}."
        mine = {}
        for name in whole:
            if name.startswith(there):
                short = name.removeprefix(there)
                if local:
                    short = short.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
                    short = short.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
                mine[short] = name
        order = LOCAL_ORDER if local else TE_ORDER
        kinds = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")
        for module in order:
            for kind in kinds:
                for short, name in mine.items():
                    if short.split(".")[-2] == module and short.split(".")[-1] == kind:
                        names[f"decoder.layers.{layer}.{short}"] = name
    if stage == stages - 1:
        names |= {name: name for name in whole if name.startswith("decoder.final")}
        head = "output_layer.weight"
        if head in whole:
            names[head] = head
        elif stages > 1:
            names[head] = "embedding.word_embeddings.weight"  # the copy of a tied model's last stage
    return names


def state_of(model: nn.Module, optimizer: AdamW, spec: ModelSpec) -> dict[str, dict[str, Tensor]]:
    """The whole tensors of weights and moments."""
    parameters = dict(model.named_parameters())
    found = {"param": whole_tensors(parameters, spec)}
    for moment in ("exp_avg", "exp_avg_sq"):
        found[moment] = whole_tensors({name: optimizer.state[p][moment] for name, p in parameters.items()}, spec)
    return found


def flat(tensors: list[Tensor], bucket_elements: int) -> list[Tensor]:
    """Buckets of a distributed optimizer's flat buffer: last parameter first, each at a multiple of 64 elements."""
    buckets: list[Tensor] = []
    current = torch.zeros(0)
    for tensor in reversed(tensors):
        current = torch.cat([current, torch.full((-len(current) % 64,), 9.0), tensor.flatten().float()])
        if len(current) >= bucket_elements:
            buckets.append(current)
            current = torch.zeros(0)
    return [*buckets, current] if len(current) else buckets


def write_legacy(
    folder: Path, state: dict[str, dict[str, Tensor]], spec: ModelSpec, *, tp: int = 1, pp: int = 1,
    local: bool = False, dtype: torch.dtype = torch.float32, buffers: bool = False, **more: Any,
) -> None:  # fmt: skip
    """A checkpoint of --ckpt-format torch in folder/iter_0000002, and the file that names the newest one."""
    for stage in range(pp):
        names = stage_names(state["param"], stage, pp, spec, local=local)
        for rank in range(tp):
            path = folder / "iter_0000002" / (f"mp_rank_{rank:02d}_{stage:03d}" if pp > 1 else f"mp_rank_{rank:02d}")
            path.mkdir(parents=True)
            parts = {
                kind: {n: of_rank(w, state[kind][w], rank, tp, gated=spec.family == "llama") for n, w in names.items()}
                for kind in state
            }
            optimizer: dict[str, Any]
            if buffers:
                joined = {kind: torch.cat(flat(list(tensors.values()), 500)) for kind, tensors in parts.items()}
                key = (torch.bfloat16, torch.float32)
                torch.save({0: {key: joined}, "buckets_coalesced": True}, path / "distrib_optim.pt")
                optimizer = {"optimizer": {"param_groups": [{**GROUP, "wd_mult": 1.0, "step": 2}]}}
            else:
                optimizer = _numbered(parts, masters=dtype != torch.float32)
            content = {
                "args": arguments(spec, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **more),
                "checkpoint_version": 3.0, "iteration": 2, "optimizer": optimizer,
                "model": {name: tensor.to(dtype) for name, tensor in parts["param"].items()}
                | {"decoder.layers.0.mlp.linear_fc1._extra_state": None},
            }  # fmt: skip
            torch.save(content, path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("2")


def _numbered(parts: Mapping[str, Mapping[str, Tensor]], *, masters: bool) -> dict[str, Any]:
    """The state of an optimizer that numbers parameters, in two groups: matrices, then vectors and biases."""
    groups = [[n for n, t in parts["param"].items() if (t.ndim > 1) == matrices] for matrices in (True, False)]
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
    state = {
        number: {"exp_avg": parts["exp_avg"][name], "exp_avg_sq": parts["exp_avg_sq"][name], "step": torch.tensor(2.0)}
        for name, number in numbers.items()
    }
    param_groups = [
        {**GROUP, "wd_mult": mult, "params": [numbers[name] for name in group]}
        for mult, group in zip((1.0, 0.0), groups, strict=True)
    ]
    inner = {"state": state, "param_groups": param_groups}
    if not masters:
        return inner
    return {"optimizer": inner, "fp32_from_fp16_params": [[parts["param"][name] for name in group] for group in groups]}


def write_distributed(
    folder: Path, state: dict[str, dict[str, Tensor]], spec: ModelSpec, *, tp: int = 1, pp: int = 1,
    stacked: bool = True, dtype: torch.dtype = torch.float32, buffers: bool = False, local: bool = True,
    weights: Mapping[str, Tensor] | None = None, **more: Any,
) -> None:  # fmt: skip
    """A checkpoint of --ckpt-format torch_dist in folder/iter_0000002.

    Args:
        weights: the model's weights, if they are others than the float32 ones of the optimizer.
    """
    path = folder / "iter_0000002"
    path.mkdir(parents=True)
    tensors: dict[str, Any] = _stacked({n: t.to(dtype) for n, t in (weights or state["param"]).items()}, spec, stacked)
    group = {**GROUP, "wd_mult": 1.0, "step": 2}
    common: dict[str, Any] = {"iteration": 2, "checkpoint_version": 3.0}
    common["args"] = arguments(spec, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **more)
    if buffers:
        tensors |= _buffers(state, spec, tp, pp, local)
        tensors["optimizer.distributed.dp_group_idx_0.optimizer/shard_0_1"] = [{"param_groups": [group]}]
    else:
        for kind in state:
            if kind != "param" or dtype != torch.float32:
                prefix = "optimizer.state." + ("fp32_param" if kind == "param" else kind)
                tensors |= {f"{prefix}.{n}": t for n, t in _stacked(state[kind], spec, stacked).items()}
        common["optimizer"] = {"param_groups": [group], "state": {"common_step": torch.tensor(2.0)}}
    dcp.save(tensors, checkpoint_id=str(path), planner=DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    torch.save(common, path / "common.pt")


def _stacked(whole: Mapping[str, Tensor], spec: ModelSpec, stacked: bool) -> dict[str, Tensor]:
    if not stacked:
        return dict(whole)
    found = {name: tensor for name, tensor in whole.items() if not name.startswith("decoder.layers.")}
    for name in [name.removeprefix("decoder.layers.0.") for name in whole if name.startswith("decoder.layers.0.")]:
        layers = [whole[f"decoder.layers.{layer}.{name}"] for layer in range(spec.layers)]
        found[f"decoder.layers.{name}"] = torch.stack(layers)
    return found


def _buffers(state: dict[str, dict[str, Tensor]], spec: ModelSpec, tp: int, pp: int, local: bool) -> dict[str, Tensor]:
    found = {}
    for stage in range(pp):
        names = stage_names(state["param"], stage, pp, spec, local=local).values()
        for rank in range(tp):
            prefix = f"optimizer.distributed.dp_group_idx_{stage * tp + rank}.gbuf_idx_0"
            for kind, whole in state.items():
                parts = [of_rank(name, whole[name], rank, tp, gated=spec.family == "llama") for name in names]
                for number, bucket in enumerate(flat(parts, 500)):
                    key = f"{prefix}.dtype_(torch.bfloat16, torch.float32).bucket_idx_{number}.{kind}"
                    found[key] = bucket
    return found
