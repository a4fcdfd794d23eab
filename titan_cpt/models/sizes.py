"""The named model sizes, and what can be said of a model without building it: parameters and floating-point operations.

Imports no torch: the plan asks here and must answer in milliseconds. The parameter counts are exact, and the tests hold
them against the built models and against the published counts.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, cast

from titan_cpt.errors import ConfigError

VOCABULARY_MULTIPLE = 128
"""A padded vocabulary is a multiple of this many rows on every tensor-parallel rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """All that fixes a model's weights and its function. One that cannot be built raises ConfigError."""

    family: str
    """The architecture: a key of `SIZES`."""
    layers: int
    """Number of transformer blocks."""
    width: int
    """Features of the residual stream (D)."""
    heads: int
    """Attention heads (N); must divide `width`."""
    mlp_width: int
    """Features inside the feed-forward (F)."""
    vocab_size: int
    """Rows of the embedding and of the head (V), padding included."""
    rotary_fraction: float = 0.25
    """Share of each head that is rotated, in (0, 1]."""
    rope_base: float = 10_000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""
    parallel_residual: bool = True
    """Attention and feed-forward both read the block's input; otherwise the feed-forward reads attention's result."""

    def __post_init__(self) -> None:
        """Raises ConfigError, a line for each fault found."""
        faults = _type_faults(self) or _value_faults(self)
        if faults:
            raise ConfigError("\n".join(faults))

    @property
    def head_width(self) -> int:
        """Features of one attention head (H)."""
        return self.width // self.heads

    @property
    def rotary_width(self) -> int:
        """Features of one head that are rotated, an even number."""
        return round(self.head_width * self.rotary_fraction)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the input embedding alone. The head, which is not tied to it, has as many."""
        return self.vocab_size * self.width

    @property
    def parameters_without_embeddings(self) -> int:
        """Every weight and bias but those of the input embedding and of the output embedding (the head)."""
        norm = 2 * self.width
        attention = 3 * self.width * (self.width + 1) + self.width * (self.width + 1)
        mlp = self.mlp_width * (self.width + 1) + self.width * (self.mlp_width + 1)
        return self.layers * (2 * norm + attention + mlp) + norm

    @property
    def parameters(self) -> int:
        """Every weight and bias, both embeddings with their padding rows included."""
        return self.parameters_without_embeddings + 2 * self.embedding_parameters

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of training (forward and backward) for one token of a sequence of `seq_len` tokens.

            6 * (parameters - input embedding) + 12 * layers * width * seq_len

        A multiply-add counts as two and only matrix products count; looking a row of the embedding up is none. The
        second term is attention's two products; it is not halved for the causal mask, and recomputation is not counted,
        so that the utilisation drawn from it compares with that of others.
        Source: PaLM, arXiv:2204.02311, appendix B; torchtitan counts alike.
        """
        return 6 * (self.parameters - self.embedding_parameters) + 12 * self.layers * self.width * seq_len


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

SIZES: Mapping[str, tuple[str, ...]] = {"gpt_neox": tuple(_GPT_NEOX)}
"""The families, and the names of each one's sizes."""


def named_size(
    family: str,
    size: str,
    tokenizer_vocab: int,
    tensor_parallel: int = 1,
    overrides: Mapping[str, Any] | None = None,
) -> ModelShape:
    """The shape of a named size for a tokenizer and a tensor-parallel degree, with single fields overridden.

    The vocabulary of a CPU size (debug, tiny, mini) is the tokenizer's, that of a released size the larger of the
    release's and the tokenizer's; either is padded up to a multiple of 128 x `tensor_parallel`. An overridden
    `vocab_size` is taken as it stands. The feed-forward is 4 x as wide as the model unless `mlp_width` is overridden.

    Args:
        family: a key of `SIZES`.
        size: one of `SIZES[family]`.
        tokenizer_vocab: number of token ids that the tokenizer can give out.
        tensor_parallel: ranks that share one model's matrices; each gets the same number of vocabulary rows.
        overrides: fields of `ModelShape` but `family`, by name.

    Raises:
        ConfigError: the family, the size or an overridden field is unknown, or the shape cannot be built.
    """
    overrides = dict(overrides or {})
    if family not in SIZES:
        raise ConfigError(_unknown("model.family", family, SIZES))
    if size not in SIZES[family]:
        raise ConfigError(_unknown("model.size", size, SIZES[family]))
    fields = [field.name for field in dataclasses.fields(ModelShape) if field.name != "family"]
    faults = [_unknown(f"model.{name}", name, fields) for name in overrides if name not in fields]
    if faults:
        raise ConfigError("\n".join(faults))

    layers, width, heads, released_vocab = _GPT_NEOX[size]
    vocab_size = _padded(max(released_vocab or 0, tokenizer_vocab), VOCABULARY_MULTIPLE * tensor_parallel)
    width = overrides.get("width", width)
    chosen = {"layers": layers, "width": width, "heads": heads, "mlp_width": 4 * width, "vocab_size": vocab_size}
    shape = ModelShape(family=family, **(chosen | overrides))

    if shape.vocab_size < tokenizer_vocab or shape.vocab_size % tensor_parallel:
        raise ConfigError(
            f"model.vocab_size: must hold the tokenizer's {tokenizer_vocab:,} tokens and be a multiple of the "
            f"tensor-parallel degree {tensor_parallel}, got {shape.vocab_size:,}; leave it out to have {vocab_size:,}"
        )
    return shape


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _unknown(path: str, name: str, allowed: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    near = difflib.get_close_matches(name, list(allowed), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{path}: unknown {path.rpartition('.')[2]} {name!r}; {hint}Allowed: {', '.join(allowed)}"


def _type_faults(shape: ModelShape) -> list[str]:
    faults = []
    for field in dataclasses.fields(shape):
        kind, value = cast(type, field.type), getattr(shape, field.name)
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (kind is not bool and isinstance(value, bool)):
            faults.append(f"model.{field.name}: must be {kind.__name__}, got {value!r}")
    return faults


def _value_faults(shape: ModelShape) -> list[str]:
    names = ("layers", "width", "heads", "mlp_width", "vocab_size", "rope_base", "norm_eps")
    faults = [
        f"model.{name}: must be above 0, got {getattr(shape, name)}" for name in names if getattr(shape, name) <= 0
    ]
    if faults:
        return faults
    if shape.width % shape.heads:
        faults.append(f"model.heads: must divide model.width = {shape.width}, got {shape.heads}")
    rotated = shape.head_width * shape.rotary_fraction
    if not 0 < shape.rotary_fraction <= 1 or abs(rotated / 2 - round(rotated / 2)) > 1e-9 or rotated < 2:
        faults.append(
            f"model.rotary_fraction: must be in (0, 1] and rotate an even number of the {shape.head_width} features of "
            f"a head, got {shape.rotary_fraction} ({rotated:g} features)"
        )
    return faults
