"""Llama, Mistral, Qwen2 and Qwen3 in Hugging Face's format: weight names and config.json. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_cpt.models.huggingface_keys import Keys
from titan_cpt.models.huggingface_names import weight_names_of
from titan_cpt.models.huggingface_rope import read_rope, rope_scaling_keys
from titan_cpt.models.llama.spec import LlamaSpec

_ALL = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "layer_types": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
CONFIG_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        **_ALL,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        **_ALL,
        "num_key_value_heads": 8,
        "head_dim": None,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
    },
    "qwen2": {**_ALL, **_QWEN},
    "qwen3": {**_ALL, **_QWEN, "head_dim": 128, "attention_bias": False},
}
"""model_type -> optional keys of config.json with transformers' defaults."""

_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_QKV_BIAS = {f"attention.{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}
_QK_NORM = {f"attention.{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}


def weight_names(spec: LlamaSpec) -> dict[str, str]:
    """Our name of every weight -> its name in Hugging Face's files."""
    block = _BLOCK | (_QKV_BIAS if spec.qkv_bias else {}) | (_QK_NORM if spec.qk_norm else {})
    return weight_names_of(block, spec)


def spec_fields(keys: Keys) -> dict[str, Any]:
    """Fields of the spec from config.json, except those that `spec_from_config` reads for all families."""
    kind = keys.table["model_type"]
    return {
        **fields_of_llama(keys),
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "sliding_window": _sliding_window(keys) if "sliding_window" in keys.defaults else None,
    }


def fields_of_llama(keys: Keys) -> dict[str, Any]:
    """The fields that every model_type has, and that other families below `LlamaSpec` share."""
    keys.only("hidden_act", "silu")
    for bias in ("attention_bias", "mlp_bias"):  # not keys of Qwen2 (always q, k and v biases) and Mistral (none)
        if bias in keys.defaults:
            keys.only(bias, False)
    rope, fraction = read_rope(keys, base="rope_theta", fraction="partial_rotary_factor")
    if fraction != 1.0:
        keys.add_problem("partial_rotary_factor", f"only 1.0 is supported, got {fraction}")
    width, heads = keys.number(int, "hidden_size"), keys.number(int, "num_attention_heads")
    head_width = width // max(heads, 1)
    if "head_dim" in keys.defaults or "head_dim" in keys.table:
        head_width = _head_width(keys, head_width)
    return {
        "width": width,
        "kv_heads": keys.number(int, "num_key_value_heads", null=heads),
        "head_width": head_width,
        "mlp_width": keys.number(int, "intermediate_size"),
        "rope_base": rope.base,
        "norm_eps": keys.number(float, "rms_norm_eps"),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        "rope_scaling": rope.scaling,
    }


def _head_width(keys: Keys, width_over_heads: int) -> int:
    """head_dim. Null means width / heads, but only for a model_type whose default is null."""
    if "head_dim" in keys.defaults and keys.defaults["head_dim"] is None:
        return int(keys.number(int, "head_dim", null=width_over_heads))
    return int(keys.number(int, "head_dim"))


def _sliding_window(keys: Keys) -> int | None:
    """The sliding window of all layers, or None. Mistral has one unless the key is null, Qwen if it is switched on."""
    window = keys.number(int, "sliding_window", null=None)
    if "use_sliding_window" not in keys.defaults:
        return None if window is None else int(window)
    switched_on = keys.flag("use_sliding_window")
    layers, full = keys.number(int, "num_hidden_layers"), keys.number(int, "max_window_layers")
    kinds = keys.value("layer_types")
    if kinds is None:
        slides = switched_on and window is not None
        kinds = ["sliding_attention" if slides and layer >= full else "full_attention" for layer in range(layers)]
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or set(map(str, kinds)) - {"sliding_attention", "full_attention"}
    ):
        keys.add_problem(
            "layer_types", f"must be a list of {layers} full_attention or sliding_attention, got {kinds!r}"
        )
    elif len(set(kinds)) > 1:
        keys.add_problem("layer_types", "a sliding window in only some of the layers is not supported")
    elif "sliding_attention" in kinds:
        if switched_on and window is not None:
            return int(window)
        keys.add_problem(
            "layer_types", "are sliding_attention, but use_sliding_window or sliding_window turns the window off"
        )
    return None


def config_fields(spec: LlamaSpec) -> tuple[str, dict[str, Any]]:
    """The simplest transformers class that computes this model, and its config.json.

    config.json lacks the keys that `config_from_spec` writes for all families.
    """
    if spec.qk_norm:
        kind, name = "qwen3", "Qwen3ForCausalLM"
    elif spec.qkv_bias:
        kind, name = "qwen2", "Qwen2ForCausalLM"
    elif spec.sliding_window is not None:
        kind, name = "mistral", "MistralForCausalLM"
    else:
        kind, name = "llama", "LlamaForCausalLM"
    config = config_of_llama(spec) | {"model_type": kind}
    if kind == "mistral":
        config["sliding_window"] = spec.sliding_window
    elif kind != "llama":
        slides = spec.sliding_window is not None
        config |= {"use_sliding_window": slides, "sliding_window": spec.sliding_window}
        config["max_window_layers"] = 0 if slides else spec.layers
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = False
    if kind == "llama":
        config["mlp_bias"] = False
    return name, config


def config_of_llama(spec: LlamaSpec) -> dict[str, Any]:
    """The keys of config.json that every model_type has, and that other families below `LlamaSpec` share."""
    return {
        "hidden_act": "silu",
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_width,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_base,
        "rope_scaling": rope_scaling_keys(spec.rope_scaling) if spec.rope_scaling else None,
        "attention_dropout": 0.0,
    }


def settings_to_compare(spec: LlamaSpec, config: Any) -> dict[str, tuple[Any, Any]]:
    """Key -> (our value, the value in transformers' config object) of the settings to compare in this family."""
    keys = {"rms_norm_eps": "norm_eps", "num_key_value_heads": "kv_heads"}
    found = {key: (getattr(spec, ours), getattr(config, key)) for key, ours in keys.items() if hasattr(config, key)}
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found["head_dim"] = spec.head_width, head_width
    if config.model_type in ("llama", "mistral") or hasattr(config, "layer_types"):  # Qwen's since transformers 4.53
        found["sliding_window"] = spec.sliding_window, _window_of(config)
    return found


def _window_of(config: Any) -> int | None:
    """The sliding window in transformers' config object, or None. Llama ignores the key if a config has it."""
    if config.model_type == "llama":
        return None
    slides = config.model_type == "mistral" or "sliding_attention" in config.layer_types
    return config.sliding_window if slides else None
