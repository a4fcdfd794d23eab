"""SmolLM3 in Hugging Face's format: weight names as in Llama, and config.json. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_cpt.models.huggingface_keys import Keys, every_nth
from titan_cpt.models.llama.huggingface import config_of_llama, fields_of_llama, weight_names
from titan_cpt.models.smollm3.spec import SmolLM3Spec

__all__ = ["CONFIG_DEFAULTS", "config_fields", "settings_to_compare", "spec_fields", "weight_names"]

CONFIG_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "smollm3": {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "partial_rotary_factor": 1.0,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 32_768,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
    }
}
"""model_type -> optional keys of config.json with transformers' defaults."""


def spec_fields(keys: Keys) -> dict[str, Any]:
    """Fields of the spec from config.json, except those that `spec_from_config` reads for all families."""
    layers = keys.number(int, "num_hidden_layers")
    interval = _interval(keys, layers)
    return {
        **fields_of_llama(keys),
        "nope_interval": interval,
        "sliding_window": _sliding_window(keys, layers, interval),
    }


def _interval(keys: Keys, layers: int) -> int:
    """The interval of layers without rotary positions; no_rope_layers, which has 0 for these layers, overrides it."""
    interval = int(keys.number(int, "no_rope_layer_interval"))
    rotated = keys.value("no_rope_layers")
    if rotated is None:
        if interval < 1:
            keys.add_problem("no_rope_layer_interval", f"must be above 0, got {interval}")
        return max(interval, 1)
    if not isinstance(rotated, list) or len(rotated) < layers or any(one not in (0, 1) for one in rotated):
        keys.add_problem("no_rope_layers", f"must be a list of {layers} zeros (no rotary positions) and ones")
        return 1
    found = every_nth([not one for one in rotated[:layers]], interval)
    if found is None:
        without = ", ".join(str(layer) for layer in range(layers) if not rotated[layer])
        keys.add_problem(
            "no_rope_layers", f"must leave out rotary positions in every n-th layer, got none in the layers {without}"
        )
    return found or 1


def _sliding_window(keys: Keys, layers: int, interval: int) -> int | None:
    """The sliding window of the layers without rotary positions; None: none, or there are no such layers."""
    given = keys.number(int, "sliding_window", null=None)
    without_rope = [(layer + 1) % interval == 0 for layer in range(layers)]
    window = given if keys.flag("use_sliding_window") and any(without_rope) else None
    slides = ["sliding_attention" if one and window is not None else "full_attention" for one in without_rope]
    kinds = keys.value("layer_types")
    if kinds is None or kinds == slides:
        return window
    if kinds == ["full_attention"] * layers:
        return None
    keys.add_problem(
        "layer_types", "only a sliding window in exactly the layers without rotary positions, or in none, is supported"
    )
    return None


def config_fields(spec: SmolLM3Spec) -> tuple[str, dict[str, Any]]:
    """The transformers class that computes this model, and its config.json.

    config.json lacks the keys that `config_from_spec` writes for all families.
    """
    layers = range(spec.layers)
    config = config_of_llama(spec) | {
        "model_type": "smollm3",
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layer_interval": spec.nope_interval,
        "no_rope_layers": [int(spec.layer_rope(layer) is not None) for layer in layers],
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "layer_types": ["full_attention" if spec.layer_window(i) is None else "sliding_attention" for i in layers],
        "pad_token_id": None,  # the default, 128,004, is beyond a smaller vocabulary, which transformers refuses
    }
    return "SmolLM3ForCausalLM", config


def settings_to_compare(spec: SmolLM3Spec, config: Any) -> dict[str, tuple[Any, Any]]:
    """Key -> (our value, the value in transformers' config object) of the settings to compare in this family."""
    rotated = [spec.layer_rope(layer) is not None for layer in range(spec.layers)]
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    return {
        "rms_norm_eps": (spec.norm_eps, config.rms_norm_eps),
        "num_key_value_heads": (spec.kv_heads, config.num_key_value_heads),
        "no_rope_layers": (rotated, [bool(one) for one in config.no_rope_layers[: spec.layers]]),
        "layer_types": (spec.layer_windows, tuple(config.sliding_window if one else None for one in slides)),
    }
