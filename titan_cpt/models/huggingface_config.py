"""Hugging Face's config.json and our shapes: the mapping both ways. Imports no torch.

What we do not compute is refused rather than left out: a config that is accepted describes our model exactly. Its keys
are read in the spelling of transformers 4 and 5, and written in that of 4, which both read, and vLLM too. A key that
may be missing has the default of transformers' own config class of that model_type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.huggingface_keys import Keys
from titan_cpt.models.huggingface_rope import read_rope
from titan_cpt.models.spec import GPTNeoXSpec, LlamaSpec, ModelSpec, RopeScaling

_MOST_LAYERS = 10_000  # beyond it, a typing error would be built layer by layer
_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_ROPE = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "layer_types": None}
_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
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
    "llama": {
        **_LLAMA,
        **_ROPE,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        **_LLAMA,
        **_ROPE,
        "num_key_value_heads": 8,
        "head_dim": None,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
    },
    "qwen2": {**_LLAMA, **_ROPE, **_QWEN, **_WINDOW},
    "qwen3": {**_LLAMA, **_ROPE, **_QWEN, **_WINDOW, "head_dim": 128, "attention_bias": False},
}
"""model_type -> the keys of config.json that are read and may be missing, with transformers' defaults.

Widths, layers, heads and rows have defaults there as well; without them a file is refused as incomplete.
"""


def _gpt_neox_shape(keys: Keys) -> dict[str, Any]:
    rope = read_rope(keys, base="rotary_emb_base", share="rotary_pct")
    if rope.scaling is not None:
        keys.fault("rope_scaling", "a GPT-NeoX with scaled wavelengths is not computed here")
    keys.only("hidden_act", "gelu")
    keys.only("attention_bias", True)
    keys.only("tie_word_embeddings", False)
    return {
        "width": keys.number(int, "hidden_size"),
        "mlp_width": keys.number(int, "intermediate_size"),
        "rotary_fraction": rope.share,
        "rope_base": rope.base,
        "norm_eps": keys.number(float, "layer_norm_eps"),
        "parallel_residual": keys.flag("use_parallel_residual"),
    }


def _llama_shape(keys: Keys) -> dict[str, Any]:
    kind = keys.table["model_type"]
    keys.only("hidden_act", "silu")
    for bias in ("attention_bias", "mlp_bias"):  # Qwen2 has its biases without saying so, Mistral none
        if bias in keys.defaults:
            keys.only(bias, False)
    rope = read_rope(keys, base="rope_theta", share="partial_rotary_factor")
    if rope.share != 1.0:
        keys.fault("partial_rotary_factor", f"only 1.0 is computed here, got {rope.share}")
    width, heads = keys.number(int, "hidden_size"), keys.number(int, "num_attention_heads")
    each = width // max(heads, 1)
    own_width = "head_dim" in keys.defaults or "head_dim" in keys.table
    return {
        "width": width,
        "kv_heads": keys.number(int, "num_key_value_heads", null=heads),
        "head_width": _head_width(keys, each) if own_width else each,
        "mlp_width": keys.number(int, "intermediate_size"),
        "rope_base": rope.base,
        "norm_eps": keys.number(float, "rms_norm_eps"),
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        "sliding_window": _window(keys) if "sliding_window" in keys.defaults else None,
        "rope_scaling": rope.scaling,
    }


def _head_width(keys: Keys, each: int) -> int:
    """A null stands for width / heads only where that is the default."""
    if "head_dim" in keys.defaults and keys.defaults["head_dim"] is None:
        return int(keys.number(int, "head_dim", null=each))
    return int(keys.number(int, "head_dim"))


def _window(keys: Keys) -> int | None:
    """One window for all layers or none: Mistral has it unless the key is null, Qwen behind a switch."""
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
        keys.fault("layer_types", f"must be {layers} times full_attention or sliding_attention, got {kinds!r}")
    elif len(set(kinds)) > 1:
        keys.fault("layer_types", "a sliding window in some layers alone is not computed here")
    elif "sliding_attention" in kinds:
        if switched_on and window is not None:
            return int(window)
        keys.fault(
            "layer_types", "are sliding_attention, and use_sliding_window or sliding_window says that none slides"
        )
    return None


_KINDS: Mapping[str, tuple[type[ModelSpec], Callable[[Keys], dict[str, Any]]]] = {
    "gpt_neox": (GPTNeoXSpec, _gpt_neox_shape),
    "llama": (LlamaSpec, _llama_shape),
    "mistral": (LlamaSpec, _llama_shape),
    "qwen2": (LlamaSpec, _llama_shape),
    "qwen3": (LlamaSpec, _llama_shape),
}
"""model_type -> our shape, and what reads the keys that are its own."""


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The shape of the model that a config.json describes.

    Args:
        config: the parsed config.json.
        where: its path, for messages.

    Raises:
        CheckpointError: the model is of another kind, or the config asks for what is not computed here; names each.
    """
    kind = str(config.get("model_type"))
    if kind not in _KINDS:
        raise CheckpointError(f"{where}: model_type: must be one of {', '.join(_KINDS)}, got {kind!r}")
    spec, own = _KINDS[kind]
    keys = Keys(config, DEFAULTS[kind])
    layers = keys.number(int, "num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise CheckpointError(f"{where}: num_hidden_layers: must be at most {_MOST_LAYERS:,}, got {layers:,}")
    numbers = {
        "family": "gpt_neox" if kind == "gpt_neox" else "llama",
        "layers": layers,
        "heads": keys.number(int, "num_attention_heads"),
        "vocab_size": keys.number(int, "vocab_size"),
        **own(keys),
    }
    if config.get("quantization_config"):
        keys.fault("quantization_config", "quantised weights cannot be trained on; take the unquantised release")
    faults = list(dict.fromkeys(keys.faults))
    try:
        if not faults:
            return spec(**numbers)
    except ConfigError as error:
        faults = str(error).splitlines()
        if missing := dict.fromkeys(keys.defaulted):
            faults.append(f"missing keys have transformers' defaults: {', '.join(missing)}")
    raise CheckpointError("\n  - ".join([f"{where}: describes no model that can be taken in:", *faults]))


def config_from_spec(spec: ModelSpec, *, max_positions: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model, of the plainest architecture of transformers that computes it.

    Args:
        shape: the model's.
        max_positions: the longest sequence that it is meant for.
        dtype: of the weights beside it.

    Raises:
        CheckpointError: the family has no counterpart in transformers.
    """
    if isinstance(spec, GPTNeoXSpec):
        kind, own = "GPTNeoXForCausalLM", _gpt_neox_config(spec)
    elif not isinstance(spec, LlamaSpec):
        raise CheckpointError(
            f"models of the family {spec.family!r} have no config.json of Hugging Face's yet: _KINDS and "
            "config_from_shape in models/huggingface_config.py would describe it"
        )
    else:
        kind, own = _llama_config(spec)
    return {
        "architectures": [kind],
        **own,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": spec.tied,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _gpt_neox_config(spec: GPTNeoXSpec) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "layer_norm_eps": spec.norm_eps,
        "use_parallel_residual": spec.parallel_residual,
        "rotary_pct": spec.rotary_fraction,
        "rotary_emb_base": spec.rope_base,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _llama_config(spec: LlamaSpec) -> tuple[str, dict[str, Any]]:
    if spec.qk_norm:
        kind, name = "qwen3", "Qwen3ForCausalLM"
    elif spec.qkv_bias:
        kind, name = "qwen2", "Qwen2ForCausalLM"
    elif spec.sliding_window is not None:
        kind, name = "mistral", "MistralForCausalLM"
    else:
        kind, name = "llama", "LlamaForCausalLM"
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_act": "silu",
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_width,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_base,
        "rope_scaling": _scaling_config(spec.rope_scaling),
        "attention_dropout": 0.0,
    }
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


def _scaling_config(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    common = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }
    if scaling.kind == "llama3":
        return common | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    turns = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return common | turns | {"attention_factor": scaling.attention_factor}
