"""Gemma 3's text models in Hugging Face's format: weight names and config.json. Does not import torch.

transformers 4 writes the settings of the two kinds of layers as separate keys, and which layers are global as
`sliding_window_pattern` or `layer_types`; 5 writes `layer_types` and a table per kind in `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_cpt.models.gemma3.spec import Gemma3Spec
from titan_cpt.models.huggingface_keys import Keys, every_nth
from titan_cpt.models.huggingface_names import weight_names_of
from titan_cpt.models.huggingface_rope import read_rope, rope_scaling_keys
from titan_cpt.models.spec import Rope

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
CONFIG_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "partial_rotary_factor": 1.0,
        "num_attention_heads": 8,  # the releases from 4b on omit it, and the rows of the embedding
        "vocab_size": 262_208,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attention_bias": False,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "layer_types": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }
}
"""model_type -> optional keys of config.json with transformers' defaults."""
TEXT_PARTS = {"gemma3": "gemma3_text"}
"""model_type of text and images -> that of its text part."""

_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.weight": "pre_feedforward_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "post_mlp_norm.weight": "post_feedforward_layernorm.weight",
}


def weight_names(spec: Gemma3Spec) -> dict[str, str]:
    """Our name of every weight -> its name in Hugging Face's files."""
    return weight_names_of(_BLOCK, spec)


def spec_fields(keys: Keys) -> dict[str, Any]:
    """Fields of the spec from config.json, except those that `spec_from_config` reads for all families."""
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    for switch in ("attention_bias", "use_bidirectional_attention"):
        if keys.value(switch) is not None:
            keys.only(switch, False)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if keys.value(cap) is not None:
            keys.add_problem(
                cap, f"soft-capping, which Gemma 3 does not have, is not supported, got {keys.value(cap)!r}"
            )
    global_rope, local_rope = _ropes(keys)
    return {
        "width": keys.number(int, "hidden_size"),
        "kv_heads": keys.number(int, "num_key_value_heads"),
        "head_width": keys.number(int, "head_dim"),
        "query_pre_attn_scalar": keys.number(float, "query_pre_attn_scalar"),
        "mlp_width": keys.number(int, "intermediate_size"),
        "rope_base": global_rope.base,
        "local_rope_base": local_rope.base,
        "norm_eps": keys.number(float, "rms_norm_eps"),
        "tie_embeddings": keys.flag("tie_word_embeddings"),
        "sliding_window": keys.number(int, "sliding_window"),
        "global_interval": _interval(keys),
        "rope_scaling": global_rope.scaling,
    }


def _interval(keys: Keys) -> int:
    """The interval of global layers; layer_types overrides sliding_window_pattern."""
    layers, interval = keys.number(int, "num_hidden_layers"), int(keys.number(int, "sliding_window_pattern"))
    kinds = keys.value("layer_types")
    if kinds is None:
        if interval < 1:
            keys.add_problem("sliding_window_pattern", f"must be above 0, got {interval}")
        return max(interval, 1)
    if not isinstance(kinds, list) or len(kinds) != layers or {*map(str, kinds)} - {_GLOBAL, _LOCAL}:
        keys.add_problem("layer_types", f"must be a list of {layers} {_GLOBAL} or {_LOCAL}, got {kinds!r}")
        return 1
    found = every_nth([kind == _GLOBAL for kind in kinds], interval)
    if found is None:
        layers_found = ", ".join(str(layer) for layer, kind in enumerate(kinds) if kind == _GLOBAL)
        keys.add_problem(
            "layer_types", f"only {_GLOBAL} in every n-th layer is supported, got it in the layers {layers_found}"
        )
    return found or 1


def _ropes(keys: Keys) -> tuple[Rope, Rope]:
    """RoPE of global and of local layers. `rope_scaling` is that of global layers only."""
    tables = keys.object("rope_parameters")
    if foreign := sorted(str(key) for key in tables.keys() - {_GLOBAL, _LOCAL}):
        keys.add_problem("rope_parameters", f"must have a table for {_GLOBAL} and one for {_LOCAL}, got {foreign}")
        return Rope(1.0), Rope(1.0)
    ropes = []
    for kind, base, unread in ((_GLOBAL, "rope_theta", ()), (_LOCAL, "rope_local_base_freq", ("rope_scaling",))):
        table = {key: value for key, value in keys.table.items() if key not in unread}
        part = Keys({**table, "rope_parameters": tables.get(kind)}, keys.defaults)
        rope, fraction = read_rope(part, base=base, fraction="partial_rotary_factor")
        if fraction != 1.0:
            part.add_problem("partial_rotary_factor", f"only 1.0 is supported, got {fraction}")
        keys.problems += [one.replace("rope_parameters", f"rope_parameters.{kind}") for one in part.problems]
        keys.defaulted += part.defaulted
        ropes.append(rope)
    if ropes[1].scaling is not None:
        keys.add_problem(f"rope_parameters.{_LOCAL}", "only RoPE without scaling is supported in local layers")
    return ropes[0], ropes[1]


def config_fields(spec: Gemma3Spec) -> tuple[str, dict[str, Any]]:
    """The transformers class that computes this model, and its config.json.

    config.json lacks the keys that `config_from_spec` writes for all families.
    """
    config: dict[str, Any] = {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_width,
        "query_pre_attn_scalar": _whole(spec.query_pre_attn_scalar),
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_base,
        "rope_local_base_freq": spec.local_rope_base,
        "rope_scaling": rope_scaling_keys(spec.rope_scaling) if spec.rope_scaling else None,
        "sliding_window": spec.sliding_window,
        "sliding_window_pattern": spec.global_interval,
        "layer_types": [_LOCAL if window else _GLOBAL for window in spec.layer_windows],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pad_token_id": None,  # the default, 0, freezes that row of the embedding in transformers
    }
    return "Gemma3ForCausalLM", config


def _whole(number: float) -> int | float:
    """An int if it is whole: transformers 5 refuses a float."""
    return int(number) if number == int(number) else number


def settings_to_compare(spec: Gemma3Spec, config: Any) -> dict[str, tuple[Any, Any]]:
    """Key -> (our value, the value in transformers' config object) of the settings to compare in this family."""
    keys = {
        "rms_norm_eps": "norm_eps",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head_width",
        "query_pre_attn_scalar": "query_pre_attn_scalar",
        "rope_local_base_freq": "local_rope_base",  # of transformers 4; the frequencies of 5 are compared
    }
    found = {key: (getattr(spec, ours), getattr(config, key)) for key, ours in keys.items() if hasattr(config, key)}
    theirs = tuple(config.sliding_window if kind == _LOCAL else None for kind in config.layer_types)
    found["layer_types"] = spec.layer_windows, theirs
    return found
