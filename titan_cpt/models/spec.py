"""Architecture hyperparameters that all model families share, and parameter, FLOP and activation counts from them.

Each family's own hyperparameters are in models/<family>/spec.py. Does not import torch, because the plan uses it.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from titan_cpt.errors import ConfigError

ROPE_SCALINGS: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor"),
}
"""The kinds of RoPE scaling, each with the hyperparameters that only it has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """RoPE scaling for context extension: linear, Llama 3's or YaRN; equations and sources are in common/layers.py."""

    kind: str
    """A key of `ROPE_SCALINGS`."""
    factor: float
    """Context-extension factor, 1 or more: long wavelengths, or with linear all, are multiplied by it."""
    original_seq_len: int | None = None
    """Context length before the extension, in tokens; linear has none."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_seq_len / low_freq_factor are multiplied by the whole factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_seq_len / high_freq_factor do not change."""
    beta_fast: float = 32.0
    """yarn: features that rotate more often than this over original_seq_len do not change."""
    beta_slow: float = 1.0
    """yarn: the wavelengths of features that rotate less often than this are multiplied by the whole factor."""
    attention_factor: float | None = None
    """yarn: multiplies cosine and sine. Default: 0.1 ln(factor) + 1, and 1 for the other kinds."""

    def __post_init__(self) -> None:
        """Compute the default of attention_factor, so that equal scalings compare equal."""
        if self.attention_factor is None and isinstance(self.factor, int | float) and self.factor >= 1:
            amplitude = 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0
            object.__setattr__(self, "attention_factor", amplitude)


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary position embedding that weights are trained with.

    Attributes:
        base: base of the wavelengths (theta).
        scaling: RoPE scaling; None: none.
    """

    base: float
    scaling: RopeScaling | None = None

    def __str__(self) -> str:
        """The settings as messages show them, such as "base 500,000, yarn x 4 of 2,048 tokens (beta_fast 16)"."""
        scaling = self.scaling
        if scaling is None:
            return f"base {self.base:,.10g} without scaling"
        plain = RopeScaling(kind=scaling.kind, factor=scaling.factor, original_seq_len=scaling.original_seq_len)
        numbers = {name: getattr(scaling, name) for name in ROPE_SCALINGS[scaling.kind]}
        other = [f"{name} {value:g}" for name, value in numbers.items() if value != getattr(plain, name)]
        text = f"base {self.base:,.10g}, {scaling.kind} x {scaling.factor:g}"
        if scaling.original_seq_len is not None:
            text += f" of {scaling.original_seq_len:,} tokens"
        return f"{text} ({', '.join(other)})" if other else text

    def as_record(self) -> dict[str, Any]:
        """The settings under the names that they have in a recipe, without `model.`."""
        scaling = None if self.scaling is None else dataclasses.asdict(self.scaling)
        return {"rope_base": self.base, "rope_scaling": scaling}


RECORDED_IF_SET = {"recorded_if_set": True}
"""Metadata of a spec's field that recipes lack while its value is None: it is younger than recipes of that family."""


class ParameterSpec(NamedTuple):
    """One weight or bias of a model.

    Attributes:
        name: its name relative to its block or, outside the blocks, to the whole model.
        size: its unsharded shape, one or two dimensions.
        tp_dim: the dimension that tensor parallelism shards; None: replicated.
    """

    name: str
    size: tuple[int, ...]
    tp_dim: int | None

    @property
    def elements(self) -> int:
        """Number of elements: the product of the dimensions."""
        return math.prod(self.size)


class ActivationBytes(NamedTuple):
    """Bytes per token that autograd saves in one block for the backward pass.

    Attributes:
        unchecked: without activation checkpointing.
        selective_op: with selective checkpointing per operator (mode "selective", option "op").
        compiled: without activation checkpointing, in a block that torch.compile compiled. Its backward pass computes
            again what it can from other saved tensors without a matrix product.
    """

    unchecked: float
    selective_op: float
    compiled: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec(abc.ABC):
    """Hyperparameters that every family has. Raises ConfigError if they are invalid, with one line per problem."""

    family: str
    """The architecture: one of `registry.family_names()`."""
    layers: int
    """Number of transformer blocks."""
    width: int
    """Features of the residual stream (D)."""
    heads: int
    """Attention heads (N)."""
    mlp_width: int
    """Features inside the MLP (F)."""
    vocab_size: int
    """Rows of the embedding and of the output head (V), padding included."""
    rope_base: float = 10_000.0
    """Base of the rotary wavelengths (theta)."""
    norm_eps: float = 1e-5
    """Added to the variance, or the mean square, in every norm."""

    def __post_init__(self) -> None:
        """Check all hyperparameters."""
        problems = _type_problems(self) or _positive_problems(self) or self._problems()
        if problems:
            raise ConfigError("\n".join(problems))

    @classmethod
    def sizes(cls) -> tuple[str, ...]:
        """Names of the family's sizes. A family that defines none has "custom", of which the config sets every key."""
        return ("custom",)

    @classmethod
    def size_fields(cls, size: str, overrides: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
        """The hyperparameters of a named size.

        Args:
            size: one of `sizes`.
            overrides: fields that the caller replaces afterwards; other fields may be derived from them, such as head
                width from width.

        Returns:
            Rows of the released model's embedding (None: the tokenizer's number of tokens), and the other fields.
        """
        return None, {}

    def _problems(self) -> list[str]:
        """Problems of this family's hyperparameters; their types and signs have been checked before."""
        return []

    @property
    @abc.abstractmethod
    def attention_width(self) -> int:
        """Features of all query heads together (N x H)."""

    @property
    @abc.abstractmethod
    def rotary_width(self) -> int:
        """Features of one head that are rotated; even."""

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads; fewer than `heads` with grouped-query attention."""
        return self.heads

    @property
    def kv_width(self) -> int:
        """Features of all key heads together, and of all value heads."""
        return self.attention_width // self.heads * self.key_value_heads

    @property
    def tied(self) -> bool:
        """Whether the output head uses the weight of the input embedding."""
        return False

    @property
    def sliding_window(self) -> int | None:
        """Sliding-window size in tokens of the layers that have one; None: full causal attention."""
        return None

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """RoPE scaling for context extension; None: none."""
        return None

    @property
    def rope(self) -> Rope:
        """The rotary position embedding, which a stage can change: base and scaling."""
        return Rope(self.rope_base, self.rope_scaling)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary position embeddings of the layers; a family may have several."""
        return (self.rope,)

    def layer_rope(self, layer: int) -> int | None:
        """Which of `ropes` a layer has; None: none, its queries and keys are not rotated (NoPE)."""
        return 0

    def layer_window(self, layer: int) -> int | None:
        """Sliding-window size of a layer in tokens; None: full causal attention."""
        return self.sliding_window

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """`layer_window` of every layer."""
        return tuple(self.layer_window(layer) for layer in range(self.layers))

    @property
    def windowed_share(self) -> float:
        """Fraction of the layers that have a sliding window."""
        return sum(window is not None for window in self.layer_windows) / self.layers

    def with_rope(self, rope: Rope) -> "ModelSpec":
        """The same model with another rotary position embedding.

        Raises:
            ConfigError: a value is invalid, or the family has no RoPE scaling.
        """
        if rope.scaling == self.rope_scaling:
            return dataclasses.replace(self, rope_base=rope.base)
        if all(field.name != "rope_scaling" for field in dataclasses.fields(self)):
            raise ConfigError(f"model.rope_scaling: the family {self.family!r} has no RoPE scaling: leave it out")
        changes: dict[str, Any] = {"rope_base": rope.base, "rope_scaling": rope.scaling}
        return dataclasses.replace(self, **changes)

    @abc.abstractmethod
    def block_parameters(self) -> tuple[ParameterSpec, ...]:
        """Every parameter of one transformer block."""

    @abc.abstractmethod
    def final_norm_parameters(self) -> tuple[ParameterSpec, ...]:
        """The parameters of the norm before the output head."""

    @property
    def estimates_activations(self) -> bool:
        """Whether the family computes its activation memory; otherwise the plan's memory lacks it and says so."""
        return type(self).activation_bytes_per_token is not ModelSpec.activation_bytes_per_token

    def activation_bytes_per_token(self, *, tp: int, cp: int, dtype_bytes: int) -> ActivationBytes:
        """Activation memory of a block on one rank, per token that the rank holds under context parallelism.

        The average over blocks if they differ.

        Args:
            tp: tensor-parallel degree t, with sequence parallelism.
            cp: context-parallel degree.
            dtype_bytes: bytes per element of the compute dtype.
        """
        return ActivationBytes(0.0, 0.0, compiled=0.0)

    @property
    def parameters_without_embeddings(self) -> int:
        """Number of parameters without input embedding and output head."""
        block = sum(parameter.elements for parameter in self.block_parameters())
        return self.layers * block + sum(parameter.elements for parameter in self.final_norm_parameters())

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters of the input embedding; an untied output head has as many."""
        return self.vocab_size * self.width

    @property
    def parameters(self) -> int:
        """Number of parameters, including padding rows of the vocabulary; a tied embedding counts once."""
        return self.parameters_without_embeddings + (1 if self.tied else 2) * self.embedding_parameters

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of training (forward and backward) per token of a sequence of `seq_len` tokens.

            6 * (parameters without embeddings + head)
            + 12 * attention width * sum over layers of min(seq_len, sliding window)

        A multiply-add counts as two operations. Only matrix products count; an embedding lookup does not. The second
        term is attention's two products (scores, and scores times values). It is not halved for the causal mask, and
        recomputation is not counted, so that model FLOPs utilization (MFU) is comparable with published numbers.
        Source: PaLM, arXiv:2204.02311, appendix B; torchtitan counts the same.
        """
        products = self.parameters_without_embeddings + self.embedding_parameters
        return 6 * products + 12 * self.attention_width * sum(self.attended_spans(seq_len))

    def attended_spans(self, seq_len: int) -> tuple[int, ...]:
        """Positions that a token attends to in each layer, not halved for the causal mask."""
        return tuple(min(seq_len, window or seq_len) for window in self.layer_windows)

    def masked_flops_per_token(self, seq_len: int, spans: Sequence[float]) -> float:
        """`flops_per_token`, where a token attends to these numbers of positions on average, one for each layer.

        With a document mask that is the sum over documents: a document of n tokens has n * min(n, sliding window).
        """
        saved = sum(self.attended_spans(seq_len)) - sum(spans)
        return self.flops_per_token(seq_len) - 12 * self.attention_width * saved

    def as_recipe(self) -> dict[str, Any]:
        """Dotted config key -> value of every field, as in a run's recipe and in a checkpoint's manifest."""
        unset = {
            field.name
            for field in dataclasses.fields(self)
            if field.metadata == RECORDED_IF_SET and getattr(self, field.name) is None
        }
        return {f"model.{name}": value for name, value in sorted(dataclasses.asdict(self).items()) if name not in unset}


def rope_scaling_problems(scaling: RopeScaling) -> list[str]:
    """A message for each value of a RoPE scaling that is not allowed."""
    where = "model.rope_scaling."
    if scaling.kind not in ROPE_SCALINGS:
        return [f"{where}kind: must be one of {', '.join(ROPE_SCALINGS)}, got {scaling.kind!r}"]
    if problems := _type_problems(scaling, where):
        return problems
    if scaling.factor < 1:
        problems.append(f"{where}factor: must be 1 or more, got {scaling.factor:g}")
    if scaling.kind == "linear":
        if scaling.original_seq_len is not None:
            problems.append(f"{where}original_seq_len: must be unset with kind linear, got {scaling.original_seq_len}")
        return problems
    if scaling.original_seq_len is None:
        return [*problems, f"{where}original_seq_len: is missing; {scaling.kind} needs it"]
    if scaling.original_seq_len <= 0:
        problems.append(f"{where}original_seq_len: must be above 0, got {scaling.original_seq_len}")
    pairs = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}
    low, high = pairs[scaling.kind]
    if not 0 < getattr(scaling, low) < getattr(scaling, high):
        problems.append(f"{where}{low}: must be above 0 and below {high}, got {getattr(scaling, low):g}")
    return problems


def _type_problems(spec: ModelSpec | RopeScaling, prefix: str = "model.") -> list[str]:
    problems = []
    for field in dataclasses.fields(spec):
        kind, value = field.type, getattr(spec, field.name)
        number = value is not None and "float" in str(kind)
        fits = isinstance(value, int | float if number else kind)  # type: ignore[arg-type]  # a type or a union of them
        if not fits or (kind is not bool and isinstance(value, bool)):
            name = kind.__name__ if isinstance(kind, type) else str(kind)
            problems.append(f"{prefix}{field.name}: must be {name}, got {value!r}")
    return problems


def _positive_problems(spec: ModelSpec) -> list[str]:
    """A message for each number that is not above 0 and finite, except rotary_fraction, which `_problems` checks."""
    values = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name != "rotary_fraction"}
    return [
        f"model.{name}: must be above 0{'' if value <= 0 else ' and finite'}, got {value}"
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < math.inf
    ]
