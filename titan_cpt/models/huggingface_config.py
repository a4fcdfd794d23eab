"""Hugging Face's config.json and our shapes: the mapping both ways. Imports no torch.

What we do not compute is refused rather than left out: a config that is accepted describes our model exactly. Its keys
are read in the spelling of transformers 4 and 5, and written in that of 4, which both read, and vLLM too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.shapes import GPTNeoXShape, LlamaShape, ModelShape, RopeScaling

REQUIRED = object()


class _Reader:
    """Takes keys out of a config.json and gathers what is wrong with them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.faults = config, list[str]()
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        self.rope: Mapping[str, Any] = rope if isinstance(rope, Mapping) else {}
        if not isinstance(rope, Mapping):
            self.faults.append(f"rope_scaling: must be a table, got {rope!r}")

    def number(self, kind: type, *keys: str, default: Any = REQUIRED) -> Any:
        """The first of the keys that is there, as an int or a float."""
        found = next((self.config[key] for key in keys if self.config.get(key) is not None), default)
        whole = isinstance(found, int | float) and not isinstance(found, bool) and found == kind(found)
        if found is None or whole:
            return None if found is None else kind(found)
        self.faults.append(f"{keys[0]}: {'is missing' if found is REQUIRED else f'must be a number, got {found!r}'}")
        return kind(1)

    def only(self, key: str, allowed: Any, default: Any = None) -> None:
        """Refuse any value of a key but one; the default is what transformers takes where it is missing."""
        found = self.config.get(key, allowed if default is None else default)
        if found != allowed:
            self.faults.append(f"{key}: only {allowed!r} is computed here, got {found!r}")

    def flag(self, key: str, default: bool) -> bool:
        found = self.config.get(key, default)
        if not isinstance(found, bool):
            self.faults.append(f"{key}: must be true or false, got {found!r}")
        return bool(found)

    def rope_base(self, key: str) -> float:
        """The base of the wavelengths: in rope_parameters since transformers 5, a key of its own before."""
        if "rope_theta" in self.rope:
            return float(_Reader(self.rope).number(float, "rope_theta"))
        return float(self.number(float, key, default=10_000.0))

    def rope_scaling(self) -> RopeScaling | None:
        kind = self.rope.get("rope_type", self.rope.get("type", "default"))
        if kind == "default":
            return None
        theirs = {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast"}
        theirs |= {"beta_slow", "attention_factor", "rope_type", "type", "rope_theta", "truncate"}
        unknown = sorted(key for key, value in self.rope.items() if value is not None and key not in theirs)
        whole_head = self.rope.get("partial_rotary_factor", 1.0) == 1.0
        unknown = [key for key in unknown if key != "partial_rotary_factor" or not whole_head]
        if kind not in ("llama3", "yarn") or unknown or self.rope.get("truncate", True) is not True:
            extra = f" with {', '.join(unknown)}" if unknown else ""
            self.faults.append(
                f"rope_scaling: llama3 and yarn are computed here, got {kind!r}{extra}: {dict(self.rope)}"
            )
            return None
        part = _Reader({key: value for key, value in self.rope.items() if value is not None})
        scaling = RopeScaling(
            kind=kind,
            factor=part.number(float, "factor"),
            original_seq_len=part.number(
                int, "original_max_position_embeddings", default=self.config.get("max_position_embeddings", REQUIRED)
            ),
            low_freq_factor=part.number(float, "low_freq_factor", default=REQUIRED if kind == "llama3" else 1.0),
            high_freq_factor=part.number(float, "high_freq_factor", default=REQUIRED if kind == "llama3" else 4.0),
            beta_fast=part.number(float, "beta_fast", default=32.0),
            beta_slow=part.number(float, "beta_slow", default=1.0),
            attention_factor=part.number(float, "attention_factor", default=None) if kind == "yarn" else None,
        )
        self.faults += [f"rope_scaling.{fault}" for fault in part.faults]
        return scaling

    def sliding_window(self, layers: int) -> int | None:
        """One window for all layers or none, as Mistral has it; Qwen has a switch besides, off in all its releases."""
        kinds = set(self.config.get("layer_types") or ())
        window = self.number(int, "sliding_window", default=None)
        if self.config.get("model_type") == "mistral":
            return window if isinstance(window, int) else None
        if not self.config.get("use_sliding_window", False) or kinds == {"full_attention"}:
            return None
        full = self.number(int, "max_window_layers", default=layers)
        if kinds == {"sliding_attention"} or (not kinds and full == 0):
            return window if isinstance(window, int) else None
        if kinds or full < layers:
            self.faults.append("layer_types: a sliding window in some layers alone is not computed here")
        return None


def _gpt_neox_shape(read: _Reader) -> dict[str, Any]:
    fraction = read.rope.get("partial_rotary_factor", read.config.get("rotary_pct", 0.25))
    if read.rope_scaling() is not None:
        read.faults.append("rope_scaling: a GPT-NeoX with scaled wavelengths is not computed here")
    read.only("hidden_act", "gelu")
    read.only("attention_bias", True)
    read.only("tie_word_embeddings", False)
    width = read.number(int, "hidden_size")
    return {
        "width": width,
        "mlp_width": read.number(int, "intermediate_size"),
        "rotary_fraction": float(fraction),
        "rope_base": read.rope_base("rotary_emb_base"),
        "norm_eps": read.number(float, "layer_norm_eps", default=1e-5),
        "parallel_residual": read.flag("use_parallel_residual", True),
    }


def _llama_shape(read: _Reader) -> dict[str, Any]:
    kind = read.config["model_type"]
    read.only("hidden_act", "silu")
    read.only("mlp_bias", False)
    if kind != "qwen2":  # which has its biases without saying so
        read.only("attention_bias", False)
    if read.rope.get("partial_rotary_factor", 1.0) != 1.0:
        read.faults.append(
            f"partial_rotary_factor: only 1.0 is computed here, got {read.rope['partial_rotary_factor']}"
        )
    width, heads = read.number(int, "hidden_size"), read.number(int, "num_attention_heads")
    layers = read.number(int, "num_hidden_layers")
    return {
        "width": width,
        "kv_heads": read.number(int, "num_key_value_heads", default=heads),
        "head_width": read.number(int, "head_dim", default=128 if kind == "qwen3" else width // max(heads, 1)),
        "mlp_width": read.number(int, "intermediate_size"),
        "rope_base": read.rope_base("rope_theta"),
        "norm_eps": read.number(float, "rms_norm_eps", default=1e-6),
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "tie_embeddings": read.flag("tie_word_embeddings", False),
        "sliding_window": read.sliding_window(layers) if kind != "llama" else None,
        "rope_scaling": read.rope_scaling(),
    }


_KINDS: Mapping[str, tuple[type[ModelShape], Callable[[_Reader], dict[str, Any]]]] = {
    "gpt_neox": (GPTNeoXShape, _gpt_neox_shape),
    "llama": (LlamaShape, _llama_shape),
    "mistral": (LlamaShape, _llama_shape),
    "qwen2": (LlamaShape, _llama_shape),
    "qwen3": (LlamaShape, _llama_shape),
}
"""model_type -> our shape, and what reads the keys that are its own."""


def shape_from_config(config: Mapping[str, Any], where: str) -> ModelShape:
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
    shape, own = _KINDS[kind]
    read = _Reader(config)
    numbers = {
        "family": "gpt_neox" if kind == "gpt_neox" else "llama",
        "layers": read.number(int, "num_hidden_layers"),
        "heads": read.number(int, "num_attention_heads"),
        "vocab_size": read.number(int, "vocab_size"),
        **own(read),
    }
    if config.get("quantization_config"):
        read.faults.append("quantization_config: quantised weights cannot be trained on; take the unquantised release")
    faults = list(dict.fromkeys(read.faults))
    try:
        if not faults:
            return shape(**numbers)
    except ConfigError as error:
        faults = str(error).splitlines()
    raise CheckpointError("\n  - ".join([f"{where}: describes no model that can be taken in:", *faults]))


def config_from_shape(shape: ModelShape, *, max_positions: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model, of the plainest architecture of transformers that computes it.

    Args:
        shape: the model's.
        max_positions: the longest sequence that it is meant for.
        dtype: of the weights beside it.
    """
    if isinstance(shape, GPTNeoXShape):
        kind, own = "GPTNeoXForCausalLM", _gpt_neox_config(shape)
    else:
        assert isinstance(shape, LlamaShape), f"no config for {type(shape).__name__}"
        kind, own = _llama_config(shape)
    return {
        "architectures": [kind],
        **own,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _gpt_neox_config(shape: GPTNeoXShape) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "layer_norm_eps": shape.norm_eps,
        "use_parallel_residual": shape.parallel_residual,
        "rotary_pct": shape.rotary_fraction,
        "rotary_emb_base": shape.rope_base,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _llama_config(shape: LlamaShape) -> tuple[str, dict[str, Any]]:
    if shape.qk_norm:
        kind, name = "qwen3", "Qwen3ForCausalLM"
    elif shape.qkv_bias:
        kind, name = "qwen2", "Qwen2ForCausalLM"
    elif shape.sliding_window is not None:
        kind, name = "mistral", "MistralForCausalLM"
    else:
        kind, name = "llama", "LlamaForCausalLM"
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_act": "silu",
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_base,
        "rope_scaling": _scaling_config(shape.rope_scaling),
        "attention_dropout": 0.0,
    }
    if kind == "mistral":
        config["sliding_window"] = shape.sliding_window
    elif kind != "llama":
        slides = shape.sliding_window is not None
        config |= {"use_sliding_window": slides, "sliding_window": shape.sliding_window}
        config["max_window_layers"] = 0 if slides else shape.layers
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
