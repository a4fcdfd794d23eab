"""Hugging Face's config.json and our specs, mapped both ways. Does not import torch.

A config that we cannot compute exactly is refused. Keys are read in the spelling of transformers 4 and 5, and written
in that of 4, which both versions and vLLM read. An optional key has the default of transformers' own config class of
that model_type; widths, layers, heads and vocabulary are required, although they have defaults there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.huggingface_keys import Keys
from titan_cpt.models.registry import FAMILIES, SPECS, family_module
from titan_cpt.models.spec import ModelSpec

_MOST_LAYERS = 10_000  # otherwise a typing error would be built layer by layer
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    model_type: defaults
    for family in FAMILIES
    for model_type, defaults in family_module(family, "huggingface").CONFIG_DEFAULTS.items()
}
"""model_type -> optional keys of config.json with transformers' defaults, of all families."""
_FAMILY = {kind: family for family in FAMILIES for kind in family_module(family, "huggingface").CONFIG_DEFAULTS}


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The spec of the model that a config.json describes.

    Args:
        config: the parsed config.json.
        where: its path, for messages.

    Raises:
        CheckpointError: the model_type or a value is not supported; names each.
    """
    kind = str(config.get("model_type"))
    if kind not in _FAMILY:
        raise CheckpointError(f"{where}: model_type: must be one of {', '.join(_FAMILY)}, got {kind!r}")
    family = _FAMILY[kind]
    keys = Keys(config, DEFAULTS[kind])
    layers = keys.number(int, "num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise CheckpointError(f"{where}: num_hidden_layers: must be at most {_MOST_LAYERS:,}, got {layers:,}")
    fields = {
        "family": family,
        "layers": layers,
        "heads": keys.number(int, "num_attention_heads"),
        "vocab_size": keys.number(int, "vocab_size"),
        **family_module(family, "huggingface").spec_fields(keys),
    }
    if config.get("quantization_config"):
        keys.add_problem("quantization_config", "quantized weights cannot be trained; use the unquantized release")
    problems = list(dict.fromkeys(keys.problems))
    try:
        if not problems:
            return SPECS[family](**fields)
    except ConfigError as error:
        problems = str(error).splitlines()
        if missing := dict.fromkeys(keys.defaulted):
            problems.append(f"missing keys have transformers' defaults: {', '.join(missing)}")
    raise CheckpointError("\n  - ".join([f"{where}: describes a model that is not supported:", *problems]))


def config_from_spec(spec: ModelSpec, *, max_positions: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model, for the plainest architecture in transformers that computes it.

    Args:
        spec: the model's.
        max_positions: the longest sequence that the model is meant for.
        dtype: of the weights beside it.

    Raises:
        ConfigError: the spec's family is unknown.
    """
    architecture, own = family_module(spec.family, "huggingface").config_fields(spec)
    return {
        "architectures": [architecture],
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
