"""The model that Megatron-LM's arguments describe; a checkpoint holds those that it was trained with.

Source: megatron/training/arguments.py and core/transformer of core_v0.16.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.registry import spec_class
from titan_cpt.models.spec import ModelSpec, RopeScaling

_NOT_HERE = {  # arguments of other architectures -> what they are
    "num_experts": "a mixture of experts",
    "multi_latent_attention": "multi-latent attention",
    "is_hybrid_model": "a hybrid of Mamba and attention layers",
    "hybrid_override_pattern": "a hybrid of Mamba and attention layers",
    "experimental_attention_variant": "another kind of attention",
    "heterogeneous_layers_config_path": "layers that differ from each other",
    "heterogeneous_layers_config_encoded_json": "layers that differ from each other",
    "squared_relu": "a squared ReLU",
    "quick_geglu": "a gated quick GELU",
    "openai_gelu": "OpenAI's GELU",
    "apply_layernorm_1p": "norms with the scale 1 + weight",
    "qk_l2_norm": "an L2 norm of queries and keys",
    "rotary_interleaved": "interleaved RoPE",
    "rotary_seq_len_interpolation_factor": "linear interpolation of positions",
    "no_rope_freq": "layers without RoPE",
    "window_size": "a sliding window in Transformer Engine's form",
    "apply_query_key_layer_scaling": "scores scaled by the layer's number",
    "attention_output_gate": "a gate on the attention's output",
    "apply_residual_connection_post_layernorm": "residuals from after the norm",
}
_SCALED_TOKENS = 8192  # what --use-rope-scaling takes as the context before the extension


def spec_from_arguments(arguments: Mapping[str, Any], *, rows: int, where: str) -> ModelSpec:
    """The model of a checkpoint from its arguments.

    Args:
        rows: rows of the embedding in the checkpoint.
        where: the file that holds the arguments.

    Raises:
        CheckpointError: arguments are missing.
        ConfigError: they describe a model that is not available here.
    """
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if not arguments.get(name)]
    if missing:
        raise CheckpointError(
            f"{where}: holds no {', '.join(missing)} among the arguments of Megatron-LM, so the model is unknown: give "
            "the training script with --config SCRIPT.sh, or a TOML file with [model]"
        )
    swiglu = bool(arguments.get("swiglu"))
    problems = [
        f"{name} = {arguments[name]!r}: {what}"
        for name, what in _NOT_HERE.items()
        if arguments.get(name) not in (None, False, 0, "", [])
    ]
    problems += _differences(arguments, swiglu)
    if problems:
        raise ConfigError("\n  - ".join([f"{where}: describes a model that is not available here:", *problems]))
    fields = _shared_fields(arguments, rows) | (_llama_fields(arguments) if swiglu else _gpt_neox_fields(arguments))
    family = "llama" if swiglu else "gpt_neox"
    try:
        return spec_class(family)(family=family, **fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _differences(arguments: Mapping[str, Any], swiglu: bool) -> list[str]:
    """What a model with SwiGLU (Llama) or without (GPT-NeoX) must have."""
    family = "llama" if swiglu else "gpt_neox"
    rotary = arguments.get("position_embedding_type", "learned_absolute")
    if arguments.get("use_rotary_position_embeddings"):
        rotary = "rope"
    wanted: dict[str, tuple[Any, Any]] = {
        "position_embedding_type": (rotary, "rope"),
        "normalization": (arguments.get("normalization", "LayerNorm"), "RMSNorm" if swiglu else "LayerNorm"),
        "add_bias_linear": (_has_biases(arguments), not swiglu),
    }
    if swiglu:
        wanted["rotary_percent"] = float(arguments.get("rotary_percent", 1.0)), 1.0
    else:
        wanted["untie_embeddings_and_output_weights"] = (
            bool(arguments.get("untie_embeddings_and_output_weights")),
            True,
        )
        wanted["group_query_attention"] = _key_value_heads(arguments), int(arguments["num_attention_heads"])
        heads = int(arguments["num_attention_heads"])
        width = int(arguments["hidden_size"]) // heads
        wanted["kv_channels"] = int(arguments.get("kv_channels") or width), width
        wanted["qk_layernorm"] = bool(arguments.get("qk_layernorm")), False
    return [
        f"{name}: {found} there, {needed} in family {family}"
        for name, (found, needed) in wanted.items()
        if found != needed
    ]


def _has_biases(arguments: Mapping[str, Any]) -> bool:
    if "add_bias_linear" in arguments:
        return bool(arguments["add_bias_linear"])
    return not arguments.get("disable_bias_linear")


def _key_value_heads(arguments: Mapping[str, Any]) -> int:
    groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else None
    return int(groups or arguments["num_attention_heads"])


def _shared_fields(arguments: Mapping[str, Any], rows: int) -> dict[str, Any]:
    width = int(arguments["hidden_size"])
    return {
        "layers": int(arguments["num_layers"]),
        "width": width,
        "heads": int(arguments["num_attention_heads"]),
        "mlp_width": int(arguments.get("ffn_hidden_size") or 4 * width),
        "vocab_size": rows,
        "rope_base": float(arguments.get("rotary_base") or 10_000),
        "norm_eps": float(arguments.get("norm_epsilon") or arguments.get("layernorm_epsilon") or 1e-5),
        "rope_scaling": _rope_scaling(arguments),
    }


def _rope_scaling(arguments: Mapping[str, Any]) -> RopeScaling | None:
    if not arguments.get("use_rope_scaling"):
        return None
    factor = float(arguments.get("rope_scaling_factor") or 8.0)
    return RopeScaling(kind="llama3", factor=factor, original_seq_len=_SCALED_TOKENS)


def _llama_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    heads = int(arguments["num_attention_heads"])
    return {
        "kv_heads": _key_value_heads(arguments),
        "head_width": int(arguments.get("kv_channels") or int(arguments["hidden_size"]) // heads),
        "qkv_bias": bool(arguments.get("add_qkv_bias")),
        "qk_norm": bool(arguments.get("qk_layernorm")),
        "tie_embeddings": not arguments.get("untie_embeddings_and_output_weights"),
    }


def _gpt_neox_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"rotary_fraction": float(arguments.get("rotary_percent", 1.0)), "parallel_residual": False}
