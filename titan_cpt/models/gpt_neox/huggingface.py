"""GPT-NeoX in Hugging Face's format: weight names and config.json. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_cpt.models.gpt_neox.spec import GPTNeoXSpec
from titan_cpt.models.huggingface_keys import Keys
from titan_cpt.models.huggingface_rope import read_rope, rope_scaling_keys

CONFIG_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gpt_neox": {
        "hidden_act": "gelu",
        "attention_bias": True,
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000.0,
        "max_position_embeddings": 2048,
    },
}
"""model_type -> optional keys of config.json with transformers' defaults."""

_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "attention.query_key_value",
    "attention.out": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def weight_names(spec: GPTNeoXSpec) -> dict[str, str]:
    """Our name of every weight -> its name in Hugging Face's files."""
    names = {"embedding.weight": "gpt_neox.embed_in.weight"}
    for layer in range(spec.layers):
        for ours, theirs in _BLOCK.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"gpt_neox.layers.{layer}.{theirs}.{kind}"
    for kind in ("weight", "bias"):
        names[f"final_norm.{kind}"] = f"gpt_neox.final_layer_norm.{kind}"
    names["head.weight"] = "embed_out.weight"
    return names


def spec_fields(keys: Keys) -> dict[str, Any]:
    """Fields of the spec from config.json, except those that `spec_from_config` reads for all families."""
    rope, fraction = read_rope(keys, base="rotary_emb_base", fraction="rotary_pct")
    keys.only("hidden_act", "gelu")
    keys.only("attention_bias", True)
    keys.only("tie_word_embeddings", False)
    return {
        "width": keys.number(int, "hidden_size"),
        "mlp_width": keys.number(int, "intermediate_size"),
        "rotary_fraction": fraction,
        "rope_base": rope.base,
        "rope_scaling": rope.scaling,
        "norm_eps": keys.number(float, "layer_norm_eps"),
        "parallel_residual": keys.flag("use_parallel_residual"),
    }


def config_fields(spec: GPTNeoXSpec) -> tuple[str, dict[str, Any]]:
    """The class in transformers, and config.json without the keys that `config_from_spec` writes for all families."""
    return "GPTNeoXForCausalLM", {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "layer_norm_eps": spec.norm_eps,
        "use_parallel_residual": spec.parallel_residual,
        "rotary_pct": spec.rotary_fraction,
        "rotary_emb_base": spec.rope_base,
        **({"rope_scaling": rope_scaling_keys(spec.rope_scaling)} if spec.rope_scaling else {}),
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def settings_to_compare(spec: GPTNeoXSpec, config: Any) -> dict[str, tuple[Any, Any]]:
    """Key -> (our value, the value in transformers' config object) of the settings to compare in this family."""
    keys = {"layer_norm_eps": "norm_eps", "use_parallel_residual": "parallel_residual"}
    return {key: (getattr(spec, ours), getattr(config, key)) for key, ours in keys.items() if hasattr(config, key)}
