"""Checkpoints as torchtitan writes them, made with only DCP: names, fused moments, order of features of RoPE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim import AdamW

from titan_cpt.models.build import build_model
from titan_cpt.models.llama.spec import LlamaSpec
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import RopeScaling

_SMALL = {"vocab_size": 300, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24}
_SCALING = RopeScaling(kind="llama3", factor=8.0, original_seq_len=8192)
SPECS = {
    "llama3": named_size("llama", "debug", 257, {**_SMALL, "rope_base": 500_000.0, "rope_scaling": _SCALING}),
    "qwen3": named_size(
        "llama", "debug", 257, {**_SMALL, "head_width": 6, "qk_norm": True, "norm_eps": 1e-6, "tie_embeddings": True}
    ),
}
BLOCK = {
    "attention_norm": "attention_norm",
    "attention.q": "attention.qkv_linear.wq",
    "attention.k": "attention.qkv_linear.wk",
    "attention.v": "attention.qkv_linear.wv",
    "attention.out": "attention.wo",
    "attention.q_norm": "attention.q_norm",
    "attention.k_norm": "attention.k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
}


def trained(spec: LlamaSpec, steps: int = 2) -> tuple[nn.Module, AdamW]:
    """A model and its AdamW after some steps on random tokens."""
    model = build_model(spec)
    model.init_weights(3)
    optimizer = AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for seed in range(steps):
        tokens = torch.randint(0, spec.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def their_name(ours: str) -> str:
    """torchtitan's name of a weight of ours."""
    outside = {"embedding": "tok_embeddings", "final_norm": "norm", "head": "lm_head"}
    module, _, kind = ours.rpartition(".")
    if not module.startswith("blocks."):
        return f"{outside[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"layers.{layer}.{BLOCK[inner]}.{kind}"


def in_their_order(ours: str, rows: Tensor, spec: LlamaSpec) -> Tensor:
    """Query and key rows of llama3: feature 2i is our feature i, feature 2i + 1 is our feature i + H/2."""
    if spec.qk_norm or ours.split(".")[-2] not in ("q", "k"):
        return rows.detach().clone()
    width = spec.head_width
    row = torch.arange(rows.shape[0])
    feature = row % width
    return rows.detach()[row - feature + feature // 2 + feature % 2 * (width // 2)]


def fused(parts: dict[str, Tensor], spec: LlamaSpec) -> Tensor:
    """The moments of wqkv: for each key/value head its query heads, then its key, then its value."""
    rows = []
    shared, width = spec.heads // spec.kv_heads, spec.head_width
    for group in range(spec.kv_heads):
        rows.append(parts["q"][group * shared * width : (group + 1) * shared * width])
        rows += [parts[part][group * width : (group + 1) * width] for part in "kv"]
    return torch.cat(rows)


def state_of(model: nn.Module, optimizer: AdamW, spec: LlamaSpec, *, fuse: bool = True) -> dict[str, Any]:
    """The state dict that torchtitan gives DCP."""
    state: dict[str, Any] = {}
    moments: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    for ours, weight in model.named_parameters():
        theirs = their_name(ours)
        state[theirs] = in_their_order(ours, weight, spec)
        name = theirs.replace(".wq.", ".wqkv.").replace(".wk.", ".wqkv.").replace(".wv.", ".wqkv.") if fuse else theirs
        for key, value in optimizer.state[weight].items():
            own = value if key == "step" else in_their_order(ours, value, spec)
            if name != theirs and key != "step":
                parts.setdefault(name, {}).setdefault(key, {})[ours.split(".")[-2]] = own
            else:
                moments[f"state.{name}.{key}"] = own.detach().clone()
        for key, value in optimizer.param_groups[0].items():
            if key != "params":
                groups[f"param_groups.{name}.{key}"] = value
    for name, keys in parts.items():
        moments |= {f"state.{name}.{key}": fused(each, spec) for key, each in keys.items()}
    if spec.tied:
        state["lm_head.weight"] = state["tok_embeddings.weight"]
    return {
        **state,
        "optimizer": {**moments, **groups},
        "lr_scheduler": {"last_epoch": 2},
        "dataloader": {"dp_rank_0": b"position"},
        "train_state": {"step": 2, "ntokens_seen": 36},
    }


def write(folder: Path, state: dict[str, Any]) -> Path:
    """Save a state dict with DCP."""
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


def config_json(spec: LlamaSpec) -> dict[str, Any]:
    """What torchtitan 0.3 writes of a model with `--debug.save_config_file`, without keys that are not read."""
    scaling = spec.rope_scaling
    rope: dict[str, Any] = {"dim": spec.head_width, "theta": spec.rope_base, "scaling": "none", "rope_factor": 1.0}
    if scaling is not None:
        rope |= {
            "scaling": "llama",
            "scaling_factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_seq_len,
        }
    norm = {"eps": spec.norm_eps}
    linear = {"bias": False, "out_features": spec.mlp_width}
    layer = {
        "attention": {
            "n_heads": spec.heads,
            "n_kv_heads": None if spec.kv_heads == spec.heads else spec.kv_heads,
            "qkv_linear": {"head_dim": spec.head_width, "wqkv": {"bias": False}},
            "wo": linear,
            "qk_norm": norm if spec.qk_norm else None,
            "rope": rope,
        },
        "feed_forward": {"w1": linear, "w2": linear, "w3": linear},
        "moe": None,
        "attention_norm": norm,
        "ffn_norm": norm,
    }
    layers = [json.loads(json.dumps(layer)) | {"param_init": f"std {number}"} for number in range(spec.layers)]
    model = {
        "dim": spec.width,
        "layers": layers,
        "norm": norm,
        "lm_head": linear,
        "enable_weight_tying": spec.tie_embeddings,
    }
    return {"model_spec": {"name": "qwen3" if spec.qk_norm else "llama3", "flavor": "mine", "model": model}}
