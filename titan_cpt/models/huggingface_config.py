"""Convert Hugging Face's config.json to a spec and back. Does not import torch.

`spec_from_config` rejects a config whose model ours would not reproduce exactly. It reads the key spellings of
transformers 4 and 5; `config_from_spec` writes those of 4, which both versions and vLLM read. An optional key has the
default of the model_type's config class in transformers. Width, layers, heads and vocabulary size are required here,
although they have defaults there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.huggingface_keys import Keys
from titan_cpt.models.registry import FAMILIES, family_module, family_names, spec_class
from titan_cpt.models.spec import ModelSpec

_MOST_LAYERS = 10_000  # stops a typo in the config from building millions of layers
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    model_type: defaults
    for family in FAMILIES
    for model_type, defaults in family_module(family, "huggingface").CONFIG_DEFAULTS.items()
}
"""model_type -> optional keys of config.json with transformers' defaults, of all of titan_cpt's families."""


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The spec of the model that a config.json describes.

    Args:
        config: the parsed config.json.
        where: its path, for messages.

    Raises:
        CheckpointError: the model_type or a value is not supported; the message names every such key.
    """
    kind = str(config.get("model_type"))
    known = _families_by_model_type(kind)
    if kind not in known:
        raise CheckpointError(f"{where}: model_type: must be one of {', '.join(known)}, got {kind!r}")
    family = known[kind]
    keys = Keys(config, family_module(family, "huggingface").CONFIG_DEFAULTS[kind])
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
            return spec_class(family)(**fields)
    except ConfigError as error:
        problems = str(error).splitlines()
        if missing := dict.fromkeys(keys.defaulted):
            problems.append(f"missing keys have transformers' defaults: {', '.join(missing)}")
    raise CheckpointError("\n  - ".join([f"{where}: describes a model that is not supported:", *problems]))


def _families_by_model_type(wanted: str) -> dict[str, str]:
    """{model_type: family} of titan_cpt's families and, if they lack the wanted one, also of other packages."""
    found = {kind: family for family in FAMILIES for kind in family_module(family, "huggingface").CONFIG_DEFAULTS}
    for family in family_names() if wanted not in found else ():
        with suppress(ConfigError):  # a family without the module huggingface reads no releases
            for kind in family_module(family, "huggingface").CONFIG_DEFAULTS:
                found.setdefault(kind, family)
    return found


def config_from_spec(spec: ModelSpec, *, max_positions: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model, for the simplest transformers class that computes the same function.

    Args:
        spec: hyperparameters of the model.
        max_positions: longest sequence that the model is meant for, in tokens.
        dtype: dtype of the weight files, such as "bfloat16".

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
