"""The named model sizes: a released model, or one small enough for a CPU, under a name of its own.

Imports no torch: the plan asks here and must answer in milliseconds.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from titan_cpt.common.text import did_you_mean
from titan_cpt.errors import ConfigError
from titan_cpt.models.spec import FAMILIES, ROPE_SCALINGS, ModelSpec, RopeScaling

VOCABULARY_MULTIPLE = 128
"""A padded vocabulary is a multiple of this many rows on every tensor-parallel rank."""

_GPT_NEOX: Mapping[str, tuple[int, int, int, int | None]] = {
    # size: (layers, width, heads, padded vocabulary of the release; None: the tokenizer's)
    "debug": (2, 64, 2, None),
    "tiny": (4, 128, 4, None),
    "mini": (6, 256, 8, None),
    # Ibrahim et al. 2024, arXiv:2403.08763
    "405m": (24, 1024, 16, 50_304),
    "10b": (36, 4608, 36, 50_688),
    # Pythia: Biderman et al. 2023, arXiv:2304.01373, and the configurations on the hub
    "14m": (6, 128, 4, 50_304),
    "31m": (6, 256, 8, 50_304),
    "70m": (6, 512, 8, 50_304),
    "160m": (12, 768, 12, 50_304),
    "410m": (24, 1024, 16, 50_304),
    "1b": (16, 2048, 8, 50_304),
    "1.4b": (24, 2048, 16, 50_304),
    "2.8b": (32, 2560, 32, 50_304),
    "6.9b": (32, 4096, 32, 50_432),
    "12b": (36, 5120, 40, 50_688),
}

_LLAMA3_SCALING = RopeScaling(
    kind="llama3", factor=8.0, original_seq_len=8192, low_freq_factor=1.0, high_freq_factor=4.0
)
_LLAMA3 = {"rope_base": 500_000.0, "norm_eps": 1e-5}
_LLAMA31 = {**_LLAMA3, "rope_scaling": _LLAMA3_SCALING}
_LLAMA32 = {**_LLAMA3, "rope_scaling": dataclasses.replace(_LLAMA3_SCALING, factor=32.0), "tie_embeddings": True}
_QWEN25 = {"rope_base": 1_000_000.0, "norm_eps": 1e-6, "qkv_bias": True}
_QWEN3 = {"rope_base": 1_000_000.0, "norm_eps": 1e-6, "qk_norm": True, "head_width": 128}
_TIED = {"tie_embeddings": True}
_COARSE = {"norm_eps": 1e-5}

_LLAMA: Mapping[str, tuple[int, int, int, int, int, int | None, Mapping[str, Any]]] = {
    # size: (layers, width, heads, key/value heads, feed-forward, padded vocabulary of the release, what else is set)
    "debug": (2, 64, 2, 1, 192, None, {}),
    "tiny": (4, 128, 4, 2, 384, None, {}),
    "mini": (6, 256, 8, 4, 704, None, {}),
    # Touvron et al. 2023, arXiv:2307.09288
    "llama2-7b": (32, 4096, 32, 32, 11_008, 32_000, {}),
    "llama2-13b": (40, 5120, 40, 40, 13_824, 32_000, {}),
    "llama2-70b": (80, 8192, 64, 8, 28_672, 32_000, {}),
    # Llama 3, 3.1 and 3.2: Grattafiori et al. 2024, arXiv:2407.21783, and the configurations on the hub
    "llama3-8b": (32, 4096, 32, 8, 14_336, 128_256, _LLAMA3),
    "llama3-70b": (80, 8192, 64, 8, 28_672, 128_256, _LLAMA3),
    "llama3.1-8b": (32, 4096, 32, 8, 14_336, 128_256, _LLAMA31),
    "llama3.1-70b": (80, 8192, 64, 8, 28_672, 128_256, _LLAMA31),
    "llama3.1-405b": (126, 16_384, 128, 8, 53_248, 128_256, _LLAMA31),
    "llama3.2-1b": (16, 2048, 32, 8, 8192, 128_256, _LLAMA32),
    "llama3.2-3b": (28, 3072, 24, 8, 8192, 128_256, _LLAMA32),
    # Jiang et al. 2023, arXiv:2310.06825 (v0.1); v0.3 has no window and more tokens
    "mistral-7b": (32, 4096, 32, 8, 14_336, 32_000, {"sliding_window": 4096}),
    "mistral-7b-v0.3": (32, 4096, 32, 8, 14_336, 32_768, {"rope_base": 1_000_000.0}),
    # Qwen team 2024, arXiv:2412.15115, and the configurations of the base models on the hub
    "qwen2.5-0.5b": (24, 896, 14, 2, 4864, 151_936, _QWEN25 | _TIED),
    "qwen2.5-1.5b": (28, 1536, 12, 2, 8960, 151_936, _QWEN25 | _TIED),
    "qwen2.5-3b": (36, 2048, 16, 2, 11_008, 151_936, _QWEN25 | _TIED),
    "qwen2.5-7b": (28, 3584, 28, 4, 18_944, 152_064, _QWEN25),
    "qwen2.5-14b": (48, 5120, 40, 8, 13_824, 152_064, _QWEN25 | _COARSE),
    "qwen2.5-32b": (64, 5120, 40, 8, 27_648, 152_064, _QWEN25 | _COARSE),
    "qwen2.5-72b": (80, 8192, 64, 8, 29_568, 152_064, _QWEN25 | _COARSE),
    # Qwen team 2025, arXiv:2505.09388, and the configurations on the hub
    "qwen3-0.6b": (28, 1024, 16, 8, 3072, 151_936, _QWEN3 | _TIED),
    "qwen3-1.7b": (28, 2048, 16, 8, 6144, 151_936, _QWEN3 | _TIED),
    "qwen3-4b": (36, 2560, 32, 8, 9728, 151_936, _QWEN3 | _TIED),
    "qwen3-8b": (36, 4096, 32, 8, 12_288, 151_936, _QWEN3),
    "qwen3-14b": (40, 5120, 40, 8, 17_408, 151_936, _QWEN3),
    "qwen3-32b": (64, 5120, 64, 8, 25_600, 151_936, _QWEN3),
}

SIZES: Mapping[str, tuple[str, ...]] = {"gpt_neox": tuple(_GPT_NEOX), "llama": tuple(_LLAMA)}
"""The families, and the names of each one's sizes."""


def named_size(
    family: str,
    size: str,
    tokenizer_vocab: int,
    tensor_parallel: int = 1,
    overrides: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """The shape of a named size for a tokenizer and a tensor-parallel degree, with single fields overridden.

    The vocabulary of a CPU size (debug, tiny, mini) is the tokenizer's, that of a released size the larger of the
    release's and the tokenizer's; either is padded up to a multiple of 128 x `tensor_parallel`. An overridden
    `vocab_size` is taken as it stands. The feed-forward of a GPT-NeoX is 4 x as wide as the model unless `mlp_width` is
    overridden, a Llama's head is width / heads wide unless its size (Qwen3) or an override says otherwise.

    Args:
        family: a key of `SIZES`.
        size: one of `SIZES[family]`.
        tokenizer_vocab: number of token ids that the tokenizer can give out.
        tensor_parallel: ranks that share one model's matrices; each gets the same number of vocabulary rows.
        overrides: fields of the family's shape but `family`, by name.

    Raises:
        ConfigError: the family, the size or an overridden field is unknown, or the shape cannot be built.
    """
    overrides = dict(overrides or {})
    if family not in SIZES:
        raise ConfigError(_unknown("model.family", family, SIZES))
    if size not in SIZES[family]:
        raise ConfigError(_unknown("model.size", size, SIZES[family]))
    fields = [field.name for field in dataclasses.fields(FAMILIES[family]) if field.name != "family"]
    faults = [_unknown(f"model.{name}", name, fields) for name in overrides if name not in fields]
    if faults:
        raise ConfigError("\n".join(faults))
    if isinstance(scaling := overrides.get("rope_scaling"), Mapping):
        overrides["rope_scaling"] = RopeScaling(**scaling)

    released_vocab, chosen = _gpt_neox(size, overrides) if family == "gpt_neox" else _llama(size, overrides)
    vocab_size = _padded(max(released_vocab or 0, tokenizer_vocab), VOCABULARY_MULTIPLE * tensor_parallel)
    spec = FAMILIES[family](**{"family": family, "vocab_size": vocab_size, **chosen, **overrides})

    if spec.vocab_size < tokenizer_vocab or spec.vocab_size % tensor_parallel:
        raise ConfigError(
            f"model.vocab_size: must hold the tokenizer's {tokenizer_vocab:,} tokens and be a multiple of the "
            f"tensor-parallel degree {tensor_parallel}, got {spec.vocab_size:,}; leave it out to have {vocab_size:,}"
        )
    return spec


def as_config_table(spec: ModelSpec) -> str:
    """A [model] table that makes this shape: the size that is nearest to it, and what must be set besides."""
    candidates = {size: _overrides_to(spec, size) for size in SIZES[spec.family]}
    size, overrides = min(
        ((size, numbers) for size, numbers in candidates.items() if numbers is not None), key=lambda pair: len(pair[1])
    )
    lines = ["[model]", f'family = "{spec.family}"', f'size = "{size}"']
    return "\n".join([*lines, *(f"{name} = {_as_toml(value)}" for name, value in overrides.items())])


def _overrides_to(spec: ModelSpec, size: str) -> dict[str, Any] | None:
    """What must be set beside a size's name to have this shape; None where the size has what cannot be taken away."""
    ours, named = (
        {name.removeprefix("model."): value for name, value in each.as_recipe().items()}
        for each in (spec, named_size(spec.family, size, 1))
    )
    wanted = {name: value for name, value in ours.items() if value != named[name]}
    if None in wanted.values():
        return None
    if {"width", "heads"} & set(wanted):  # these two follow them where they are not set
        wanted |= {name: ours[name] for name in ("mlp_width", "head_width") if name in ours}
    return wanted


def _as_toml(value: Any) -> str:
    if isinstance(value, Mapping):  # rope_scaling: the numbers of the other kinds are not told
        foreign = {name for kind, names in ROPE_SCALINGS.items() if kind != value["kind"] for name in names}
        kept = {name: inner for name, inner in value.items() if name not in foreign}
        return "{ " + ", ".join(f"{name} = {_as_toml(inner)}" for name, inner in kept.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _gpt_neox(size: str, overrides: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    layers, width, heads, vocab = _GPT_NEOX[size]
    return vocab, {"layers": layers, "width": width, "heads": heads, "mlp_width": 4 * overrides.get("width", width)}


def _llama(size: str, overrides: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    layers, width, heads, kv_heads, mlp_width, vocab, more = _LLAMA[size]
    width_now, heads_now = overrides.get("width", width), overrides.get("heads", heads)
    if "head_width" not in more and "head_width" not in overrides and heads_now > 0 and width_now % heads_now:
        raise ConfigError(
            f"model.heads: must divide model.width = {width_now} where model.head_width is not set, got {heads_now}"
        )
    chosen = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "mlp_width": mlp_width}
    return vocab, chosen | {"head_width": width_now // max(heads_now, 1)} | dict(more)


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _unknown(path: str, name: str, allowed: Iterable[str]) -> str:
    hint = did_you_mean(name, allowed) or "."
    return f"{path}: unknown {path.rpartition('.')[2]} {name!r}{hint} Allowed: {', '.join(allowed)}"
