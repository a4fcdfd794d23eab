"""What fixes a model's weights and its function, one frozen dataclass per family; what can be said without building it.

Imports no torch: the plan asks here and must answer in milliseconds. The parameter counts are exact, and the tests hold
them against the built models and against the published counts.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from titan_cpt.errors import ConfigError

ROPE_SCALINGS: Mapping[str, tuple[str, ...]] = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor"),
}
"""The kinds of rotary scaling, and the numbers that only one of them has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary wavelengths are stretched so that a model reads beyond the length it was first trained on."""

    kind: str
    """A key of `ROPE_SCALINGS`; layers.py has the equations and their sources."""
    factor: float
    """Times by which long wavelengths grow."""
    original_seq_len: int
    """Length of the sequences before the extension."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_seq_len / low_freq_factor grow by the whole factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_seq_len / high_freq_factor stay."""
    beta_fast: float = 32.0
    """yarn: features that turn more often than this over original_seq_len stay."""
    beta_slow: float = 1.0
    """yarn: features that turn less often than this grow by the whole factor."""
    attention_factor: float | None = None
    """yarn: multiplies cosine and sine; left out, 0.1 ln(factor) + 1 (1 for llama3)."""

    def __post_init__(self) -> None:
        """Works attention_factor out where it was left out, so that equal scalings compare equal."""
        if self.attention_factor is None and isinstance(self.factor, int | float) and self.factor >= 1:
            amplitude = 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0
            object.__setattr__(self, "attention_factor", amplitude)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec(abc.ABC):
    """What the shapes of all families share. A shape that cannot be built raises ConfigError."""

    family: str
    """The architecture: a key of `sizes.SIZES`."""
    layers: int
    """Number of transformer blocks."""
    width: int
    """Features of the residual stream (D)."""
    heads: int
    """Attention heads (N)."""
    mlp_width: int
    """Features inside the feed-forward (F)."""
    vocab_size: int
    """Rows of the embedding and of the head (V), padding included."""
    rope_base: float = 10_000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-5
    """Added to the variance, or the mean square, in every norm."""

    def __post_init__(self) -> None:
        """Raises ConfigError, a line for each fault found."""
        faults = _type_faults(self) or _positive_faults(self) or self._faults()
        if faults:
            raise ConfigError("\n".join(faults))

    @abc.abstractmethod
    def _faults(self) -> list[str]:
        """What is wrong in this family, once every number is of its type and above 0."""

    @property
    @abc.abstractmethod
    def attention_width(self) -> int:
        """Features of the queries of all heads together (N x H)."""

    @property
    def kv_width(self) -> int:
        """Features of the keys of all heads together, and of the values; fewer where heads share them."""
        return self.attention_width

    @property
    def tied(self) -> bool:
        """Whether the head is the input embedding."""
        return False

    @property
    def sliding_window(self) -> int | None:
        """Positions that one attends to at most; None for all before it."""
        return None

    @property
    @abc.abstractmethod
    def parameters_without_embeddings(self) -> int:
        """Every weight and bias but those of the input embedding and of the output embedding (the head)."""

    @property
    def embedding_parameters(self) -> int:
        """Weights of the input embedding alone. A head that is not tied to it has as many."""
        return self.vocab_size * self.width

    @property
    def parameters(self) -> int:
        """Every weight and bias, padding rows included; a tied embedding counts once."""
        return self.parameters_without_embeddings + (1 if self.tied else 2) * self.embedding_parameters

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of training (forward and backward) for one token of a sequence of `seq_len` tokens.

            6 * (parameters without embeddings + head) + 12 * layers * attention width * min(seq_len, attention span)

        A multiply-add counts as two and only matrix products count; looking a row of the embedding up is none. The
        second term is attention's two products; it is not halved for the causal mask, and recomputation is not counted,
        so that the utilisation drawn from it compares with that of others.
        Source: PaLM, arXiv:2204.02311, appendix B; torchtitan counts alike.
        """
        products = self.parameters_without_embeddings + self.embedding_parameters
        span = min(seq_len, self.sliding_window or seq_len)
        return 6 * products + 12 * self.layers * self.attention_width * span

    def as_recipe(self) -> dict[str, Any]:
        """Every number under its dotted key, as a run's recipe and a checkpoint's manifest hold it."""
        return {f"model.{name}": value for name, value in sorted(dataclasses.asdict(self).items())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoXSpec(ModelSpec):
    """A GPT-NeoX: all that fixes its weights and its function."""

    rotary_fraction: float = 0.25
    """Share of each head that is rotated, in (0, 1]."""
    parallel_residual: bool = True
    """Attention and feed-forward both read the block's input; otherwise the feed-forward reads attention's result."""

    @property
    def head_width(self) -> int:
        """Features of one attention head (H)."""
        return self.width // self.heads

    @property
    def attention_width(self) -> int:
        """Features of the queries of all heads together, the model's width."""
        return self.width

    @property
    def rotary_width(self) -> int:
        """Features of one head that are rotated, an even number."""
        return round(self.head_width * self.rotary_fraction)

    @property
    def parameters_without_embeddings(self) -> int:
        """Every weight and bias but those of the two embeddings."""
        norm = 2 * self.width
        attention = 3 * self.width * (self.width + 1) + self.width * (self.width + 1)
        mlp = self.mlp_width * (self.width + 1) + self.width * (self.mlp_width + 1)
        return self.layers * (2 * norm + attention + mlp) + norm

    def _faults(self) -> list[str]:
        faults = []
        if self.width % self.heads:
            faults.append(f"model.heads: must divide model.width = {self.width}, got {self.heads}")
        rotated = self.head_width * self.rotary_fraction
        if not 0 < self.rotary_fraction <= 1 or abs(rotated / 2 - round(rotated / 2)) > 1e-9 or rotated < 2:
            faults.append(
                f"model.rotary_fraction: must be in (0, 1] and rotate an even number of the {self.head_width} features "
                f"of a head, got {self.rotary_fraction} ({rotated:g} features)"
            )
        return faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaSpec(ModelSpec):
    """A Llama, Mistral, Qwen2 or Qwen3: all that fixes its weights and its function."""

    kv_heads: int
    """Heads of keys and values (K), each shared by heads / kv_heads heads of queries."""
    head_width: int
    """Features of one attention head (H), an even number; width / heads but in Qwen3."""
    qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys, before they are rotated (Qwen3)."""
    tie_embeddings: bool = False
    """The head is the input embedding."""
    sliding_window: int | None = None
    """Each position sees itself and the window - 1 before it (Mistral); None: all before it."""
    rope_scaling: RopeScaling | None = None
    """How wavelengths are stretched, if they are."""

    @property
    def attention_width(self) -> int:
        """Features of the queries of all heads together (N x H)."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Features of the keys of all heads together (K x H), and of the values."""
        return self.kv_heads * self.head_width

    @property
    def tied(self) -> bool:
        """Whether the head is the input embedding."""
        return self.tie_embeddings

    @property
    def parameters_without_embeddings(self) -> int:
        """Every weight and bias but those of the two embeddings."""
        projections = self.width * (self.attention_width + 2 * self.kv_width) + self.attention_width * self.width
        biases = (self.attention_width + 2 * self.kv_width) if self.qkv_bias else 0
        norms = 2 * self.width + (2 * self.head_width if self.qk_norm else 0)
        return self.layers * (projections + biases + norms + 3 * self.width * self.mlp_width) + self.width

    def _faults(self) -> list[str]:
        faults = []
        if self.heads % self.kv_heads:
            faults.append(f"model.kv_heads: must divide model.heads = {self.heads}, got {self.kv_heads}")
        if self.head_width % 2:
            faults.append(f"model.head_width: must be even, as rotary positions turn pairs, got {self.head_width}")
        if self.qkv_bias and self.qk_norm:
            faults.append(
                "model.qk_norm: must be false where model.qkv_bias is true: no released architecture has both"
            )
        return faults + (_scaling_faults(self.rope_scaling) if self.rope_scaling else [])


def spec_from_recipe(recipe: Mapping[str, Any]) -> ModelSpec:
    """The shape whose `as_recipe` a recipe or a manifest holds, among other keys.

    Raises:
        ConfigError: its numbers make no shape of a known family.
    """
    numbers = {key.removeprefix("model."): value for key, value in recipe.items() if key.startswith("model.")}
    kind = FAMILIES.get(str(numbers.get("family")))
    names = [] if kind is None else [field.name for field in dataclasses.fields(kind)]
    if kind is None or sorted(names) != sorted(numbers):
        raise ConfigError(f"the numbers of the model are not those of a known family: {numbers}")
    if isinstance(numbers.get("rope_scaling"), Mapping):
        numbers["rope_scaling"] = RopeScaling(**numbers["rope_scaling"])
    return kind(**numbers)


FAMILIES: Mapping[str, type[ModelSpec]] = {"gpt_neox": GPTNeoXSpec, "llama": LlamaSpec}
"""The families and their shapes."""


def _type_faults(spec: ModelSpec | RopeScaling, prefix: str = "model.") -> list[str]:
    faults = []
    for field in dataclasses.fields(spec):
        kind, value = field.type, getattr(spec, field.name)
        number = value is not None and "float" in str(kind)
        fits = isinstance(value, int | float if number else kind)  # type: ignore[arg-type]  # a type or a union of them
        if not fits or (kind is not bool and isinstance(value, bool)):
            name = kind.__name__ if isinstance(kind, type) else str(kind)
            faults.append(f"{prefix}{field.name}: must be {name}, got {value!r}")
    return faults


def _positive_faults(spec: ModelSpec) -> list[str]:
    """Every number is above 0, but for the booleans; rotary_fraction has a message of its own."""
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return [
        f"model.{name}: must be above 0, got {value}"
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "rotary_fraction" and value <= 0
    ]


def _scaling_faults(scaling: RopeScaling) -> list[str]:
    where = "model.rope_scaling."
    if scaling.kind not in ROPE_SCALINGS:
        return [f"{where}kind: must be one of {', '.join(ROPE_SCALINGS)}, got {scaling.kind!r}"]
    if faults := _type_faults(scaling, where):
        return faults
    if scaling.factor < 1:
        faults.append(f"{where}factor: must be 1 or more, got {scaling.factor:g}")
    if scaling.original_seq_len <= 0:
        faults.append(f"{where}original_seq_len: must be above 0, got {scaling.original_seq_len}")
    pairs = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}
    low, high = pairs[scaling.kind]
    if not 0 < getattr(scaling, low) < getattr(scaling, high):
        faults.append(f"{where}{low}: must be above 0 and below {high}, got {getattr(scaling, low):g}")
    return faults
