"""Checkpoints as GPT-NeoX writes them with DeepSpeed, made without them: layers or ranks, ZeRO-1 shards, configs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim import AdamW

from titan_cpt.models.spec import ModelSpec


@dataclass
class fragment_address:  # DeepSpeed's name
    """Where a parameter is in a flat tensor, as DeepSpeed records it."""

    numel: int
    start: int


class LossScaler:
    """An object beside the tensors."""


def config_of(spec: ModelSpec, tp: int, pp: int) -> dict[str, Any]:
    """The YAML file of a model."""
    config: dict[str, Any] = {
        "num_layers": spec.layers, "hidden_size": spec.width, "num_attention_heads": spec.heads, "seq_length": 8,
        "max_position_embeddings": 8, "pos_emb": "rotary", "no_weight_tying": True, "pipe_parallel_size": pp,
        "model_parallel_size": tp, "attention_dropout": 0, "hidden_dropout": 0, "rotary_emb_base": int(spec.rope_base),
    }  # fmt: skip
    if spec.family == "gpt_neox":
        more = {"rotary_pct": spec.rotary_fraction, "gpt_j_residual": spec.parallel_residual, "norm": "layernorm"}
        return config | more | {"activation": "gelu", "layernorm_epsilon": spec.norm_eps}
    more: dict[str, Any] = {
        "norm": "rmsnorm",
        "use_bias_in_norms": False,
        "rms_norm_epsilon": spec.norm_eps,
        "activation": "swiglu",
        "rotary_pct": 1,
    }
    more |= {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "num_kv_heads": spec.key_value_heads}
    return config | more | {"intermediate_size": spec.mlp_width * 3, "mlp_multiple_of": 1}


def of_rank(
    ours: Mapping[str, Tensor], spec: ModelSpec, rank: int, tp: int, *, old: bool, bias: float
) -> dict[str, Tensor]:
    """One rank's tensors, by their name in the sequence of layers.

    Args:
        old: names before `linear1`.
        bias: factor of the biases of layers that write to the residual stream.
    """
    up, down = ("dense_h_to_4h", "dense_4h_to_h") if old else ("linear1", "linear2")
    found = {"0.word_embeddings.weight": ours["embedding.weight"].chunk(tp)[rank]}
    kinds = {"weight": "scale"} if spec.family == "llama" else {"weight": "weight", "bias": "bias"}
    for layer in range(spec.layers):
        block = {name.split(".", 2)[2]: t for name, t in ours.items() if name.startswith(f"blocks.{layer}.")}
        there = f"{layer + 2}."
        for mine, theirs in kinds.items():
            found[f"{there}input_layernorm.{theirs}"] = block[f"attention_norm.{mine}"]
        if spec.family == "llama":
            found[f"{there}attention.query_key_value.weight"] = _qkv(block, spec, rank, tp)
        else:
            for kind in ("weight", "bias"):
                found[f"{there}attention.query_key_value.{kind}"] = block[f"attention.qkv.{kind}"].chunk(tp)[rank]
        found[f"{there}attention.dense.weight"] = block["attention.out.weight"].chunk(tp, 1)[rank]
        if spec.family == "gpt_neox":
            found[f"{there}attention.dense.bias"] = block["attention.out.bias"] * bias
        for mine, theirs in kinds.items():
            found[f"{there}post_attention_layernorm.{theirs}"] = block[f"mlp_norm.{mine}"]
        if spec.family == "llama" and old:
            found[f"{there}mlp.w1.weight"] = block["mlp.gate.weight"].chunk(tp)[rank]
            found[f"{there}mlp.w3.weight"] = block["mlp.up.weight"].chunk(tp)[rank]
            found[f"{there}mlp.w2.weight"] = block["mlp.down.weight"].chunk(tp, 1)[rank]
            continue
        parts = [
            block[f"mlp.{name}.weight"].chunk(tp)[rank]
            for name in (("up", "gate") if spec.family == "llama" else ("up",))
        ]
        found[f"{there}mlp.{up}.weight"] = torch.cat(parts)
        found[f"{there}mlp.{down}.weight"] = block["mlp.down.weight"].chunk(tp, 1)[rank]
        if spec.family == "gpt_neox":
            found[f"{there}mlp.{up}.bias"] = block["mlp.up.bias"].chunk(tp)[rank]
            found[f"{there}mlp.{down}.bias"] = block["mlp.down.bias"] * bias
    for mine, theirs in kinds.items():
        found[f"{spec.layers + 3}.norm.{theirs}"] = ours[f"final_norm.{mine}"]
    found[f"{spec.layers + 4}.final_linear.weight"] = ours["head.weight"].chunk(tp)[rank]
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _qkv(block: Mapping[str, Tensor], spec: ModelSpec, rank: int, tp: int) -> Tensor:
    parts = [block[f"attention.{part}.weight"].chunk(tp)[rank] for part in "qkv"]
    if spec.key_value_heads != spec.heads:
        return torch.cat(parts)
    heads = [part.reshape(-1, spec.head_width, spec.width) for part in parts]
    return torch.stack(heads, 1).reshape(-1, spec.width)


def write(
    folder: Path, model: nn.Module, optimizer: AdamW, spec: ModelSpec, *, tp: int = 1, pp: int = 0, dp: int = 2,
    old: bool = False, dtype: torch.dtype = torch.float32, mapped: bool = True,
) -> None:  # fmt: skip
    """A checkpoint in folder/global_step2; the biases of a parallel residual are 1/tp of ours on each rank."""
    path = folder / "global_step2"
    (path / "configs").mkdir(parents=True)
    (path / "configs" / "model.yml").write_text(yaml.safe_dump(config_of(spec, tp, pp)))
    (folder / "latest").write_text("global_step2")
    parameters = dict(model.named_parameters())
    share = 1 / tp if getattr(spec, "parallel_residual", False) else 1.0
    kinds = {"param": (parameters, share)}
    for moment in ("exp_avg", "exp_avg_sq"):
        kinds[moment] = ({name: optimizer.state[p][moment] for name, p in parameters.items()}, 1.0)
    stages = max(pp, 1)
    for rank in range(tp):
        tensors = {kind: of_rank(ours, spec, rank, tp, old=old, bias=bias) for kind, (ours, bias) in kinds.items()}
        names = list(tensors["param"])
        layers = sorted({int(name.split(".")[0]) for name in names})
        for stage in range(stages):
            mine = layers[len(layers) * stage // stages : len(layers) * (stage + 1) // stages]
            here = {
                kind: {n: t for n, t in each.items() if int(n.split(".")[0]) in mine} for kind, each in tensors.items()
            }
            _write_rank(path, here, stage * tp + rank, pp, dp, dtype, mapped=mapped)
            for layer in mine if pp else ():
                content = {
                    n.split(".", 1)[1]: t.to(dtype) for n, t in here["param"].items() if int(n.split(".")[0]) == layer
                }
                content["attention.rotary_emb.inv_freq"] = torch.ones(2)
                torch.save(content, path / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")


def _write_rank(
    path: Path, tensors: dict[str, dict[str, Tensor]], rank: int, pp: int, dp: int, dtype: torch.dtype, *, mapped: bool
) -> None:
    """A model-parallel rank's weights, and its optimizer in shards of `dp` data-parallel ranks."""
    prefix = "" if pp else "sequential."
    groups = [[n for n, t in tensors["param"].items() if (t.ndim > 1) == matrices] for matrices in (True, False)]
    groups = [group for group in groups if group]
    module = None if pp else {prefix + name: tensor.to(dtype) for name, tensor in tensors["param"].items()}
    shapes = [{prefix + name: tensors["param"][name].shape for name in group} for group in groups]
    state = {"module": module, "param_shapes": shapes, "global_steps": 2, "args": {"num_layers": 2}}
    torch.save(state, path / f"mp_rank_{rank:02d}_model_states.pt")
    for shard in range(dp):
        flat: dict[str, list[Tensor]] = {kind: [] for kind in tensors}
        mappings = []
        for group in groups:
            total = sum(tensors["param"][name].numel() for name in group)
            length = math.ceil(total / dp)
            for kind, each in tensors.items():
                joined = torch.cat([each[name].flatten() for name in group])
                joined = torch.cat([joined, torch.zeros(length * dp - total)])
                flat[kind].append(joined[shard * length : (shard + 1) * length].clone())
            mappings.append(_fragments(tensors["param"], group, prefix, shard * length, length))
        base = {
            "state": {i: {k: flat[k][i] for k in ("exp_avg", "exp_avg_sq")} for i in range(len(groups))},
            "param_groups": [
                {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay, "step": 2, "params": [i]}
                for i, decay in zip(range(len(groups)), (0.1, 0.0), strict=False)
            ],
        }
        content = {
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": [t.requires_grad_() for t in flat["param"]],  # as DeepSpeed saves them
            "partition_count": [dp] * 2,
        }
        content |= {"loss_scaler": LossScaler()} | ({"param_slice_mappings": mappings} if mapped else {})
        name = f"{'bf16_' if dtype == torch.bfloat16 else ''}zero_pp_rank_{shard}_mp_rank_{rank:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": content, "ds_version": "0.19.8"}, path / name)


def _fragments(
    weights: Mapping[str, Tensor], group: list[str], prefix: str, first: int, length: int
) -> dict[str, fragment_address]:
    """Which elements of each parameter this shard has."""
    found, start = {}, 0
    for name in group:
        end = start + weights[name].numel()
        low, high = max(start, first), min(end, first + length)
        if low < high:
            found[prefix + name] = fragment_address(numel=high - low, start=low - first)
        start = end
    return found
