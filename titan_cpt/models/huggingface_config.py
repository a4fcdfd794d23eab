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
TEXT_PARTS: Mapping[str, str] = {
    model_type: text
    for family in FAMILIES
    for model_type, text in getattr(family_module(family, "huggingface"), "TEXT_PARTS", {}).items()
}
"""model_type of a multimodal model -> that of its text part, whose weights have the prefix `TEXT_PREFIX` in files."""
TEXT_PREFIX = "language_model."
TEXT_PART_OF = "text_part_of"
"""A key of what `text_part` returns: the model_type of the whole model."""
_OF_THE_WHOLE = ("tie_word_embeddings", "quantization_config", "bos_token_id", "eos_token_id", "torch_dtype", "dtype")


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a multimodal model's text part; of any other model, its own."""
    kind, text = str(config.get("model_type")), config.get("text_config")
    if kind not in TEXT_PARTS or not isinstance(text, Mapping):
        return dict(config)
    shared = {key: config[key] for key in _OF_THE_WHOLE if key in config}
    return {**text, **shared, "model_type": TEXT_PARTS[kind], TEXT_PART_OF: kind}


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The spec of the model that a config.json describes.

    Args:
        config: the parsed config.json; of a multimodal model, the text part is read.
        where: its path, for messages.

    Raises:
        CheckpointError: the model_type or a value is not supported; the message names every such key.
    """
    config = text_part(config)
    kind = str(config.get("model_type"))
    known = _families_by_model_type(kind)
    if kind in TEXT_PARTS:
        raise CheckpointError(f"{where}: text_config: must be an object, got {config.get('text_config')!r}")
    if kind not in known:
        names = ", ".join([*known, *TEXT_PARTS])
        raise CheckpointError(f"{where}: model_type: must be one of {names}, got {kind!r}")
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
