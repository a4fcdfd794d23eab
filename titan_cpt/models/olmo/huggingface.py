"""OLMo 2 and OLMo 3 in Hugging Face's format: weight names and config.json. Does not import torch.

transformers' Olmo3Config has RoPE settings for each kind of layer. Its versions read a config.json as follows:

- 4.57 scales the layers with full attention as `rope_scaling` says. All layers have the base `rope_theta`.
- 5.24 does the same, but the layers with a sliding window then have the base 500,000. It also reads
  `rope_parameters`, which has a table for each kind of layer, and prefers what that says. It ignores a
  `rope_parameters` without these tables.
- Without a base, 4.57 takes 10,000 and 5.24 takes 500,000.

`findings/transformers_olmo3_base.sh` shows the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_cpt.models.huggingface_keys import Keys
from titan_cpt.models.huggingface_names import weight_names_of
from titan_cpt.models.huggingface_rope import read_rope, read_rope_table, rope_scaling_keys
from titan_cpt.models.olmo.spec import OlmoSpec
from titan_cpt.models.spec import Rope

_OLMO2 = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
    "max_position_embeddings": 2048,
}
CONFIG_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "olmo2": {**_OLMO2, "rope_theta": 10_000.0},
    "olmo3": {**_OLMO2, "sliding_window": 4096, "layer_types": None},
}
"""model_type -> optional keys of config.json with transformers' defaults."""

_FULL, _SLIDING = "full_attention", "sliding_attention"
_BASE_OF_5 = 500_000.0
_DEFAULT_INTERVAL = 4
_ROPE_KEYS = {"base": "rope_theta", "fraction": "partial_rotary_factor"}

_BLOCK = {
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "post_mlp_norm.weight": "post_feedforward_layernorm.weight",
}


def weight_names(spec: OlmoSpec) -> dict[str, str]:
    """Our name of every weight -> its name in Hugging Face's files."""
    return weight_names_of(_BLOCK, spec)


def spec_fields(keys: Keys) -> dict[str, Any]:
    """Fields of the spec from config.json, except those that `spec_from_config` reads for all families."""
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    width, heads = keys.number(int, "hidden_size"), keys.number(int, "num_attention_heads")
    head_width = width // max(heads, 1)
    windows: dict[str, Any] = {}
    if keys.table["model_type"] == "olmo3":
        windows = _windows(keys)
        rope = _rope_by_layer(keys, windowed=windows["sliding_window"] is not None)
    else:
        rope, fraction = read_rope(keys, **_ROPE_KEYS)
        _require_whole_heads(keys, fraction)
    return {
        "width": width,
        "kv_heads": keys.number(int, "num_key_value_heads", null=heads),
        "head_width": keys.number(int, "head_dim") if "head_dim" in keys.table else head_width,
        "mlp_width": keys.number(int, "intermediate_size"),
        "rope_base": rope.base,
        "norm_eps": keys.number(float, "rms_norm_eps"),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        "rope_scaling": rope.scaling,
        **windows,
    }


def _require_whole_heads(keys: Keys, fraction: float) -> None:
    if fraction != 1.0:
        keys.add_problem("partial_rotary_factor", f"only 1.0 is supported, got {fraction}")


def _windows(keys: Keys) -> dict[str, int | None]:
    """Sliding window and global interval of OLMo 3."""
    without: dict[str, int | None] = {"sliding_window": None, "global_interval": None}
    window = keys.number(int, "sliding_window", null=None)
    layers, kinds = keys.number(int, "num_hidden_layers"), keys.value("layer_types")
    if kinds is None:
        kinds = _layer_types(layers, _DEFAULT_INTERVAL)
    if not isinstance(kinds, list) or len(kinds) != layers or {*map(str, kinds)} - {_FULL, _SLIDING}:
        keys.add_problem("layer_types", f"must be a list of {layers} {_FULL} or {_SLIDING}, got {kinds!r}")
        return without
    if _SLIDING not in kinds:
        return without
    if window is None:
        keys.add_problem("sliding_window", f"must be a number, because layer_types has {_SLIDING}, got None")
    if _FULL not in kinds:
        return {"sliding_window": window, "global_interval": None}
    interval = kinds.index(_FULL) + 1
    if kinds != _layer_types(layers, interval):
        found = ", ".join(str(layer) for layer, kind in enumerate(kinds) if kind == _FULL)
        keys.add_problem(
            "layer_types",
            f"only {_FULL} in every n-th layer, such as layers 3, 7, 11 and so on for n = 4, is supported, got {_FULL} "
            f"in the layers {found} of {layers}",
        )
    return {"sliding_window": window, "global_interval": interval}


def _layer_types(layers: int, interval: int | None) -> list[str]:
    return [_FULL if interval and (layer + 1) % interval == 0 else _SLIDING for layer in range(layers)]


def _rope_by_layer(keys: Keys, *, windowed: bool) -> Rope:
    """RoPE of OLMo 3's layers with full attention; those with a sliding window have the same without scaling."""
    problems_before = len(keys.problems)
    tables = _tables(keys)
    scaling = keys.object("rope_scaling")
    if scaling and tables[_FULL].get("rope_type", "default") not in ("default", scaling.get("rope_type")):
        keys.add_problem("rope_scaling", f"is {dict(scaling)}, but rope_parameters.{_FULL} is {dict(tables[_FULL])}")
    name = f"rope_parameters.{_FULL}" if tables[_FULL] else "rope_scaling"
    full, fraction = read_rope_table(keys, name, {"rope_type": "default", **tables[_FULL], **scaling}, **_ROPE_KEYS)
    local, local_fraction = read_rope_table(keys, f"rope_parameters.{_SLIDING}", tables[_SLIDING], **_ROPE_KEYS)
    _require_whole_heads(keys, fraction if fraction != 1.0 else local_fraction)
    if len(keys.problems) > problems_before or not windowed:
        return full
    if "rope_theta" not in tables[_SLIDING] and local.base != _BASE_OF_5:
        keys.add_problem(
            "rope_theta",
            f"is {local.base:,.10g}, but transformers 5 computes the layers with a sliding window with "
            f"{_BASE_OF_5:,.10g}, and transformers 4 with {local.base:,.10g}. Write the one of the training into "
            f'"rope_parameters": {{"{_FULL}": {{"rope_theta": ...}}, "{_SLIDING}": {{"rope_theta": ...}}}}',
        )
    elif local != Rope(full.base):
        keys.add_problem(
            f"rope_parameters.{_SLIDING}", f"only {Rope(full.base)}, the base of {_FULL}, is supported, got {local}"
        )
    return full


def _tables(keys: Keys) -> dict[str, Mapping[str, Any]]:
    """The two tables of `rope_parameters`; without them, what transformers 5 puts in their place."""
    given = keys.object("rope_parameters")
    if {_FULL, _SLIDING} & {*given}:
        inner = Keys(given, {}, "rope_parameters.")
        tables = {kind: inner.object(kind) for kind in (_FULL, _SLIDING)}
        keys.problems += inner.problems
        return tables
    if not given:
        return {_FULL: {}, _SLIDING: {}}
    rope, _ = read_rope_table(keys, "rope_parameters", given, **_ROPE_KEYS)
    if rope != Rope(_BASE_OF_5):
        keys.add_problem(
            "rope_parameters",
            f"must have a table {_FULL} and a table {_SLIDING}: transformers 5 ignores {dict(given)}",
        )
    return {kind: {"rope_theta": rope.base} for kind in (_FULL, _SLIDING)}


def config_fields(spec: OlmoSpec) -> tuple[str, dict[str, Any]]:
    """The simplest transformers class that computes this model, and its config.json.

    config.json lacks the keys that `config_from_spec` writes for all families.
    """
    config: dict[str, Any] = {
        "model_type": "olmo2",
        "hidden_act": "silu",
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_base,
        "rope_scaling": rope_scaling_keys(spec.rope_scaling) if spec.rope_scaling else None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pad_token_id": None,  # transformers' default is 1, and it does not train the embedding of that token
    }
    if spec.head_width * spec.heads != spec.width:
        config["head_dim"] = spec.head_width
    if spec.sliding_window is None:
        return "Olmo2ForCausalLM", config
    config["model_type"] = "olmo3"
    config["sliding_window"] = spec.sliding_window
    config["layer_types"] = _layer_types(spec.layers, spec.global_interval)
    if spec.rope_base != _BASE_OF_5:
        plain = {"rope_type": "default", "rope_theta": spec.rope_base}
        config["rope_parameters"] = {_FULL: plain, _SLIDING: plain}
    return "Olmo3ForCausalLM", config


def settings_to_compare(spec: OlmoSpec, config: Any) -> dict[str, tuple[Any, Any]]:
    """Key -> (our value, the value in transformers' config object) of the settings to compare in this family."""
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or [_FULL] * spec.layers
    windows = [config.sliding_window if kind == _SLIDING else None for kind in kinds]
    return {
        "rms_norm_eps": (spec.norm_eps, config.rms_norm_eps),
        "num_key_value_heads": (spec.kv_heads, config.num_key_value_heads),
        "head_dim": (spec.head_width, head_width),
        "layer_types and sliding_window": ([*spec.layer_windows], windows),
    }
