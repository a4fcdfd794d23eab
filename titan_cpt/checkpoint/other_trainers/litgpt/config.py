"""The model of a litgpt checkpoint, from its model_config.yaml: the fields of litgpt.Config, in 0.5.13 and before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint.other_trainers.model_config import (
    refuse_unknown_keys,
    require_keys_off,
    spec_of_trainer_config,
)
from titan_cpt.convert.reading import read_files
from titan_cpt.errors import ConfigError
from titan_cpt.models.huggingface_keys import Keys
from titan_cpt.models.registry import spec_class
from titan_cpt.models.spec import ModelSpec, RopeScaling

MODEL_CONFIG = "model_config.yaml"

_VERSION = "litgpt 0.5.13"
_OFF = (
    *("attention_logit_softcapping", "final_logit_softcapping", "first_k_dense_replace", "latent_attention"),
    *("lm_head_bias", "n_expert", "post_attention_norm", "post_mlp_norm", "rope_interleave", "rope_local_base_freq"),
    *("scale_embeddings", "shared_attention_norm"),
)
_DEFAULTS: Mapping[str, Any] = {
    "attn_bias": False,
    "bias": True,
    "gelu_approximate": "none",
    "head_size": None,
    "intermediate_size": None,
    "mlp_class_name": "GptNeoxMLP",
    "n_query_groups": None,
    "norm_1": True,
    "norm_2": True,
    "norm_class_name": "LayerNorm",
    "norm_eps": 1e-5,
    "norm_qk": False,
    "norm_qk_type": "default",
    "parallel_residual": True,
    "rope_base": 10_000,
    "rope_condense_ratio": 1,
    "rotary_percentage": 0.25,
    "sliding_window_size": None,
}
_WITHOUT_EFFECT = (  # names, limits, and numbers of what these models do not have
    *("name", "org", "hf_config", "block_size", "vocab_size", "padding_multiple", "padded_vocab_size", "rope_indices"),
    *("moe_intermediate_size", "n_expert_groups", "n_expert_per_token", "n_shared_expert", "n_topk_groups"),
    *("n_topk_scores_per_group", "norm_topk_prob", "routed_scaling_factor", "n_embd", "n_head", "n_layer"),
    *("attention_scores_scalar", "rope_adjustments", "sliding_window_indices"),  # read below
)
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_seq_len",
}


def read_litgpt_spec(path: Path, *, rows: int, tied: bool) -> ModelSpec:
    """The model that a config file describes.

    Args:
        path: litgpt's model_config.yaml, the YAML of `litgpt pretrain`, or a TOML file with our [model].
        rows: rows of the embedding in the checkpoint.
        tied: the output head has the weight of the embedding; no file of litgpt's says so in its model.

    Raises:
        ConfigError: the file cannot be read, or describes a model that is not available here.
    """
    if path.suffix == ".toml":
        return spec_of_trainer_config(path, "litgpt", rows=rows)
    keys = read_files([path], "litgpt")[1]
    if "n_layer" not in keys:
        return spec_of_trainer_config(path, "litgpt", rows=rows)
    return _spec(keys, path, rows=rows, tied=tied)


def _spec(found: Mapping[str, Any], path: Path, *, rows: int, tied: bool) -> ModelSpec:
    keys = Keys(found, _DEFAULTS)
    llama = keys.value("mlp_class_name") == "LLaMAMLP"
    require_keys_off(keys, _OFF)
    tables = {name: value for name, value in found.items() if name.split(".")[0] in ("hf_config", "rope_adjustments")}
    refuse_unknown_keys(keys, {*_OFF, *_DEFAULTS, *_WITHOUT_EFFECT, *tables}, _VERSION)
    for key in ("norm_1", "norm_2"):
        keys.only(key, True)
    keys.only("rope_condense_ratio", 1)
    width, heads = keys.number(int, "n_embd"), keys.number(int, "n_head")
    head_width = keys.number(int, "head_size", null=width // max(heads, 1))
    fields: dict[str, Any] = {
        "family": "llama" if llama else "gpt_neox",
        "layers": keys.number(int, "n_layer"),
        "width": width,
        "heads": heads,
        "mlp_width": keys.number(int, "intermediate_size", null=4 * width),
        "vocab_size": rows,
        "rope_base": keys.number(float, "rope_base"),
        "norm_eps": keys.number(float, "norm_eps"),
    }
    if found.get("attention_scores_scalar") not in (None, head_width):
        keys.add_problem("attention_scores_scalar", f"only the head size, {head_width}, is supported")
    fields["rope_scaling"] = _rope_scaling(keys)
    fields |= (_llama if llama else _gpt_neox)(keys, heads, head_width)
    if tied and not llama:
        keys.add_problem("train.tie_embeddings", "models of the family gpt_neox have a head of their own")
    elif llama:
        fields["tie_embeddings"] = tied
    if keys.problems:
        lines = "\n  - ".join(dict.fromkeys(keys.problems))
        raise ConfigError(f"{path}: describes a model that is not available here:\n  - {lines}")
    try:
        return spec_class(fields["family"])(**fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _llama(keys: Keys, heads: int, head_width: int) -> dict[str, Any]:
    for key, only in {"norm_class_name": "RMSNorm", "bias": False, "parallel_residual": False}.items():
        keys.only(key, only)
    if keys.number(float, "rotary_percentage") != 1.0:
        keys.add_problem("rotary_percentage", f"only 1.0 is supported, got {keys.value('rotary_percentage')}")
    keys.only("norm_qk_type", "default")
    return {
        "kv_heads": keys.number(int, "n_query_groups", null=heads),
        "head_width": head_width,
        "qkv_bias": keys.flag("attn_bias"),
        "qk_norm": keys.flag("norm_qk"),
        "sliding_window": _sliding_window(keys),
    }


def _gpt_neox(keys: Keys, heads: int, head_width: int) -> dict[str, Any]:
    only = {"mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "bias": True, "gelu_approximate": "none"}
    for key, value in (only | {"norm_qk": False, "sliding_window_size": None}).items():
        keys.only(key, value)
    width = keys.number(int, "n_embd")
    for key, needed in {"n_query_groups": heads, "head_size": width // max(heads, 1)}.items():
        if keys.number(int, key, null=needed) != needed:
            keys.add_problem(key, f"only {needed} is supported with GptNeoxMLP, got {keys.value(key)}")
    rotated = int(keys.number(float, "rotary_percentage") * head_width)  # litgpt rounds down
    return {
        "rotary_fraction": rotated / max(head_width, 1),
        "parallel_residual": keys.flag("parallel_residual"),
    }


def _rope_scaling(keys: Keys) -> RopeScaling | None:
    """Llama 3's RoPE scaling. litgpt's YaRN is refused: it scales the short wavelengths instead of the long ones."""
    table = {
        key.removeprefix("rope_adjustments."): value
        for key, value in keys.table.items()
        if key.startswith("rope_adjustments.")
    }
    if not table:
        return None
    if table.keys() != _LLAMA3.keys():
        keys.add_problem("rope_adjustments", f"only Llama 3's ({', '.join(_LLAMA3)}) is supported, got {table}")
        return None
    given = Keys(table, {}, "rope_adjustments.")
    numbers = {ours: given.number(int if ours.endswith("len") else float, key) for key, ours in _LLAMA3.items()}
    keys.problems += given.problems
    return None if given.problems else RopeScaling(kind="llama3", **numbers)


def _sliding_window(keys: Keys) -> int | None:
    """The window of all layers; litgpt can have it in some of them."""
    size = keys.number(int, "sliding_window_size", null=None)
    indices, layers = keys.table.get("sliding_window_indices"), keys.number(int, "n_layer")
    used = {bool(index) for index in indices[:layers]} if isinstance(indices, list) else {True}
    if size is None or used == {False}:
        return None
    if len(used) > 1:
        keys.add_problem("sliding_window_indices", "a sliding window in only some of the layers is not supported")
    return int(size)
