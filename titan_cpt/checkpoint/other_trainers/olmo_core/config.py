"""The model of an OLMo-core checkpoint, from its config.json: the fields of TransformerConfig, in 3.0.0 and before."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint.other_trainers.model_config import (
    refuse_unknown_keys,
    require_keys_off,
    spec_of_trainer_config,
)
from titan_cpt.common.reading import read_text
from titan_cpt.errors import ConfigError
from titan_cpt.models.huggingface_keys import Keys
from titan_cpt.models.registry import spec_class
from titan_cpt.models.spec import ModelSpec, RopeScaling

CONFIG = "config.json"

_VERSION = "OLMo-core 3.0.0"
_CLASS = ("_CLASS_", "type", "dtype")
_MODEL_OFF = ("embedding_norm", "block_pattern", "block_overrides")
_MODEL = (
    *("d_model", "vocab_size", "n_layers", "block", "lm_head", "name", "init_method", "init_seed", "init_std"),
    *("embedding_init_std", "freeze_params", "embed_scale", "tie_word_embeddings"),
)
_BLOCK_OFF = ("dropout", "feed_forward_moe")
_BLOCK = (
    *("sequence_mixer", "attention", "layer_norm", "feed_forward", "name"),
    *("attention_residual_alpha", "feed_forward_residual_alpha"),
)
_ATTENTION_OFF = (
    *("gate", "clip_qkv", "dropout", "scalable_softmax", "qk_norm_per_head_gains", "attention_sinks"),
    *("mxfp8_projections", "mxfp8_qkv_projection", "mxfp8_out_projection"),
)
_ATTENTION = (
    *("name", "n_heads", "n_kv_heads", "head_dim", "bias", "rope", "qk_norm", "use_head_qk_norm", "sliding_window"),
    *("use_flash", "backend", "use_recompute_qkv_prep", "mxfp8_save_qkv_for_backward"),
)
_ROPE = ("name", "theta", "full_precision", "no_global_rope", "scaling", "partial_rotary_factor")
_RMS_NORMS = ("rms", "fused_rms", "cute_rms", "qwen_rms")  # kernels of one function


@dataclass(frozen=True)
class OlmoCoreModel:
    """A model, and the order of features in its heads.

    Attributes:
        spec: the model.
        interleaved: RoPE rotates features 2i and 2i + 1 of a head ("complex"), not i and i + H/2.
    """

    spec: ModelSpec
    interleaved: bool = False


def read_olmo_core_json(path: Path) -> Mapping[str, Any]:
    """The JSON that ConfigSaverCallback writes into every checkpoint.

    Raises:
        ConfigError: it is missing or damaged, or describes no model.
    """
    try:
        found = json.loads(read_text(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. It describes the model; OLMo-core's ConfigSaverCallback writes it. Give it with "
            "--config FILE, or a TOML file with [model]"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise ConfigError(f'{path}: has no table "model", which OLMo-core\'s config.json has')
    return found


def read_olmo_core_model(path: Path, *, rows: int) -> OlmoCoreModel:
    """The model that a config file describes.

    Args:
        path: OLMo-core's config.json, or a TOML file with our [model].
        rows: rows of the embedding in the checkpoint.

    Raises:
        ConfigError: the file cannot be read, or describes a model that is not available here.
    """
    if path.suffix == ".toml":
        return OlmoCoreModel(spec_of_trainer_config(path, "torchtitan", rows=rows))
    model = Keys(read_olmo_core_json(path)["model"], {"name": "default", "tie_word_embeddings": False}, "model.")
    fields = _model_fields(model, rows)
    if model.problems:
        lines = "\n  - ".join(dict.fromkeys(model.problems))
        raise ConfigError(f"{path}: describes a model that is not available here:\n  - {lines}")
    interleaved = fields.pop("interleaved")
    try:
        return OlmoCoreModel(spec_class(fields["family"])(**fields), interleaved)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _model_fields(model: Keys, rows: int) -> dict[str, Any]:
    require_keys_off(model, _MODEL_OFF)
    refuse_unknown_keys(model, {*_CLASS, *_MODEL_OFF, *_MODEL}, _VERSION)
    model.only("name", "default")
    _require_one(model, "embed_scale")
    block = _below(model, "block", {"name": "default"})
    require_keys_off(block, _BLOCK_OFF)
    refuse_unknown_keys(block, {*_CLASS, *_BLOCK_OFF, *_BLOCK}, _VERSION)
    for key in ("attention_residual_alpha", "feed_forward_residual_alpha"):
        _require_one(block, key)
    name = "sequence_mixer" if "sequence_mixer" in block.table else "attention"  # since 3.0, and before
    attention = _below(
        block, name, {"name": "default", "bias": True, "n_heads": 16, "n_kv_heads": None, "head_dim": None}
    )
    head = _below(model, "lm_head", {"name": "default", "bias": True})
    head.only("name", "default")
    head.only("bias", False)
    width, layers = model.number(int, "d_model"), model.number(int, "n_layers")
    attended = _attention_fields(attention, width)
    fields = {
        "layers": layers,
        "width": width,
        "mlp_width": _mlp_width(block),
        "vocab_size": rows,
        "norm_eps": _norm_eps(block, head),
        "tie_embeddings": model.flag("tie_word_embeddings"),
        **attended,
        **_family_fields(block, attention, layers, attended["rope_scaling"]),
    }
    for keys in (attention, head, block):
        model.problems += keys.problems
    return fields


def _family_fields(block: Keys, attention: Keys, layers: int, scaling: RopeScaling | None) -> dict[str, Any]:
    """The family, what norms of queries and keys it has, and its sliding windows."""
    norm = attention.table.get("qk_norm")
    per_head = attention.table.get("use_head_qk_norm") is True
    name = block.value("name")
    if name == "default" and (norm is None or per_head):
        windows = _window_fields(attention, layers, some=False)
        return {"family": "llama", "qk_norm": norm is not None, **windows}
    if name == "reordered_norm" and norm is not None and not per_head:
        windows = _window_fields(attention, layers, some=True)
        if windows["sliding_window"] is not None and scaling is not None:
            attention.add_problem("rope.scaling", "only layers with full attention can have it beside sliding windows")
        return {"family": "olmo", **windows}
    what = "without norms of queries and keys" if norm is None else f"with use_head_qk_norm = {per_head}"
    block.add_problem("name", f"{name} {what} is not a model of a family here")
    return {"family": "llama"}


def _attention_fields(keys: Keys, width: int) -> dict[str, Any]:
    require_keys_off(keys, _ATTENTION_OFF)
    refuse_unknown_keys(keys, {*_CLASS, *_ATTENTION_OFF, *_ATTENTION}, _VERSION)
    if keys.value("name") not in ("default", "fused", "fused_v2"):
        keys.add_problem("name", f"must be default, fused or fused_v2, got {keys.value('name')!r}")
    keys.only("bias", False)
    heads = keys.number(int, "n_heads")
    defaults = {"name": "default", "theta": 500_000, "partial_rotary_factor": 1.0, "no_global_rope": False}
    rope = _below(keys, "rope", defaults)
    refuse_unknown_keys(rope, {*_CLASS, *_ROPE}, _VERSION)
    if rope.value("name") not in ("default", "fused", "complex"):
        rope.add_problem("name", f"must be default, fused or complex, got {rope.value('name')!r}")
    if rope.number(float, "partial_rotary_factor") != 1.0:
        rope.add_problem("partial_rotary_factor", f"only 1.0 is supported, got {rope.value('partial_rotary_factor')}")
    rope.only("no_global_rope", False)
    head_width = keys.number(int, "head_dim", null=width // max(heads, 1))
    base, scaling = _rope_scaling(rope, head_width)
    keys.problems += rope.problems
    return {
        "heads": heads,
        "kv_heads": keys.number(int, "n_kv_heads", null=heads),
        "head_width": head_width,
        "rope_base": base,
        "rope_scaling": scaling,
        "interleaved": rope.value("name") == "complex",
    }


def _rope_scaling(rope: Keys, head_width: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of RoPE; scaling classes as in OLMo-core's nn/rope.py."""
    base = rope.number(float, "theta")
    scaling = rope.object("scaling")
    kind = str(scaling.get("_CLASS_", "")).rpartition(".")[2]
    if not scaling:
        return base, None
    defaults: dict[str, float] = {"beta_fast": 32, "beta_slow": 1, "old_context_len": 8192, "new_theta": 8_000_000}
    defaults |= {"low_freq_proportion": 0.0, "high_freq_proportion": 0.25, "attention_rescale_factor": 1.0}
    keys = Keys(scaling, defaults, f"{rope.prefix}scaling.")
    rescale = keys.number(float, "attention_rescale_factor")
    result: RopeScaling | None = None
    if kind == "ABFRoPEScalingConfig":
        base = keys.number(float, "new_theta")
    elif kind in ("YaRNRoPEScalingConfig", "StepwiseRoPEScalingConfig"):
        make = _yarn if kind.startswith("YaRN") else _llama3
        result = make(keys, base, head_width)
    else:
        keys.add_problem("_CLASS_", f"{kind or 'a class that is not named'} is not available here: YaRN, Stepwise, ABF")
    if rescale != 1.0:
        keys.add_problem("attention_rescale_factor", f"only 1.0 is supported, got {rescale}")
    rope.problems += keys.problems
    return base, None if keys.problems else result


def _yarn(keys: Keys, base: float, head_width: int) -> RopeScaling:
    slow, length = keys.number(float, "beta_slow"), keys.number(int, "old_context_len")
    # OLMo-core ends the ramp at H/2 - 1, the last pair of features; YaRN's own code, and ours, at H - 1.
    last = head_width * math.log(max(length, 1) / (max(slow, 1e-9) * 2 * math.pi)) / (2 * math.log(max(base, 2.0)))
    if math.ceil(last) > head_width // 2 - 1:
        keys.add_problem("old_context_len", "is so long for this theta that OLMo-core's YaRN differs from ours")
    return RopeScaling(
        kind="yarn",
        factor=keys.number(float, "factor"),
        original_seq_len=length,
        beta_fast=keys.number(float, "beta_fast"),
        beta_slow=slow,
    )


def _llama3(keys: Keys, base: float, head_width: int) -> RopeScaling:
    low, high = keys.number(float, "low_freq_proportion"), keys.number(float, "high_freq_proportion")
    if not 0 <= low < 1 - high < 1:
        keys.add_problem("high_freq_proportion", f"must be above 0, and below 1 with the low one, got {high} and {low}")
        low, high = 0.0, 0.25
    return RopeScaling(
        kind="llama3",
        factor=keys.number(float, "factor"),
        original_seq_len=keys.number(int, "old_context_len"),
        low_freq_factor=1 / (1 - low),
        high_freq_factor=1 / high,
    )


def _window_fields(attention: Keys, layers: int, *, some: bool) -> dict[str, Any]:
    """The sliding window of all layers; or, with `some`, of all except every n-th."""
    window = attention.object("sliding_window")
    pattern = window.get("pattern")
    if not window:
        return {"sliding_window": None}
    if not isinstance(pattern, list) or not pattern or not all(type(size) is int for size in pattern):
        attention.add_problem("sliding_window.pattern", f"must be a list of numbers, got {pattern!r}")
        return {"sliding_window": None}
    first, last = (window.get(f"force_full_attention_on_{end}_layer", True) for end in ("first", "last"))
    sizes = [pattern[(layer - bool(first)) % len(pattern)] for layer in range(layers)]
    if first:
        sizes[0] = -1
    if last:
        sizes[-1] = -1
    windows = {size for size in sizes if size != -1}
    interval = sizes.index(-1) + 1 if -1 in sizes else None
    if not windows:
        return {"sliding_window": None}
    regular = all((size == -1) == (interval is not None and (i + 1) % interval == 0) for i, size in enumerate(sizes))
    if len(windows) > 1 or not regular or (interval is not None and not some):
        allowed = "all layers, or all except every n-th," if some else "all layers"
        attention.add_problem("sliding_window", f"{allowed} need one size; the layers have {sizes}")
    return {"sliding_window": max(windows), **({"global_interval": interval} if some else {})}


def _mlp_width(block: Keys) -> int:
    mlp = _below(block, "feed_forward", {"name": "default", "activation": "silu", "bias": True})
    refuse_unknown_keys(mlp, {*_CLASS, "hidden_size", "name", "bias", "activation"}, _VERSION)
    for key, only in {"name": "default", "activation": "silu", "bias": False}.items():
        mlp.only(key, only)
    width = mlp.number(int, "hidden_size")
    block.problems += mlp.problems
    return int(width)


def _norm_eps(block: Keys, head: Keys) -> float:
    """The epsilon of all norms, which are RMSNorm without bias."""
    attention = block.object("sequence_mixer") or block.object("attention")
    norms = {f"{block.prefix}layer_norm": block.table.get("layer_norm")}
    norms[f"{head.prefix}layer_norm"] = head.table.get("layer_norm")
    if attention.get("qk_norm") is not None:
        norms[f"{block.prefix}attention.qk_norm"] = attention["qk_norm"]
    found = set()
    for prefix, norm in norms.items():
        keys = Keys(
            norm if isinstance(norm, Mapping) else {},
            {"eps": 1e-5, "elementwise_affine": True, "bias": True},
            f"{prefix}.",
        )
        refuse_unknown_keys(keys, {*_CLASS, "name", "eps", "bias", "elementwise_affine", "full_precision"}, _VERSION)
        if keys.table.get("name") not in _RMS_NORMS:
            keys.add_problem("name", f"must be one of {', '.join(_RMS_NORMS)}, got {keys.table.get('name')!r}")
        keys.only("bias", False)
        keys.only("elementwise_affine", True)
        found.add(keys.number(float, "eps"))
        block.problems += keys.problems
    if len(found) > 1:
        block.add_problem("layer_norm.eps", f"all norms need one eps, got {sorted(found)}")
    return float(max(found))


def _below(keys: Keys, name: str, defaults: Mapping[str, Any]) -> Keys:
    return Keys(keys.object(name), defaults, f"{keys.prefix}{name}.")


def _require_one(keys: Keys, name: str) -> None:
    """Add a problem if a factor is there and not 1."""
    if keys.table.get(name) not in (None, 1):
        keys.add_problem(name, f"only 1 is supported, got {keys.table[name]!r}")
