"""The part of the schema that says what model is trained: [model], with every number that a named size fixes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from titan_cpt.config.types import PositiveFloat, PositiveInt, Table, fault


class RopeScalingConfig(Table):
    """[model.rope_scaling]: wavelengths stretched to read beyond the length of the first training (Llama)."""

    kind: Literal["llama3", "yarn"]
    """The rule of Llama 3.1, or YaRN."""
    factor: Annotated[float, Field(ge=1)]
    """Times by which long wavelengths grow."""
    original_seq_len: PositiveInt
    """Length of the sequences before the extension."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths above original_seq_len / this grow by the whole factor; left out, 1."""
    high_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths below original_seq_len / this stay; left out, 4."""
    beta_fast: PositiveFloat | None = None
    """yarn: features that turn more often than this over original_seq_len stay; left out, 32."""
    beta_slow: PositiveFloat | None = None
    """yarn: features that turn less often than this grow by the whole factor; left out, 1."""
    attention_factor: PositiveFloat | None = None
    """yarn: multiplies cosine and sine; left out, 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _numbers_of_its_kind(self) -> RopeScalingConfig:
        llama3, yarn = ("low_freq_factor", "high_freq_factor"), ("beta_fast", "beta_slow", "attention_factor")
        own, foreign = (llama3, yarn) if self.kind == "llama3" else (yarn, llama3)
        given = [name for name in foreign if getattr(self, name) is not None]
        if given:
            raise fault(f"{self.kind} has no {', '.join(given)}; its own are {', '.join(own)}")
        return self


class ModelConfig(Table):
    """[model]: a named size, single numbers of which may be overridden."""

    family: Literal["gpt_neox", "llama"]
    """The architecture."""
    size: str
    """A named size of that family, such as "410m", "10b", "llama3.1-8b" or, for a CPU, "debug", "tiny", "mini"."""
    layers: PositiveInt | None = None
    """Number of blocks, in place of the size's."""
    width: PositiveInt | None = None
    """Width of the residual stream, in place of the size's."""
    heads: PositiveInt | None = None
    """Attention heads, in place of the size's."""
    kv_heads: PositiveInt | None = None
    """Heads of keys and values, shared by heads / kv_heads heads of queries (Llama), in place of the size's."""
    head_width: PositiveInt | None = None
    """Width of one head (Llama), in place of the size's or width / heads."""
    mlp_width: PositiveInt | None = None
    """Inner width of the MLP, in place of the size's."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding, taken as they stand, in place of the size's or the padded tokenizer's."""
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each head that is rotated (GPT-NeoX), in place of the size's."""
    rope_base: PositiveFloat | None = None
    """Base of the rotary frequencies, in place of the size's."""
    rope_scaling: RopeScalingConfig | None = None
    """How the rotary wavelengths are stretched (Llama), in place of the size's."""
    norm_eps: PositiveFloat | None = None
    """Epsilon of the norms, in place of the size's."""
    parallel_residual: bool | None = None
    """Attention and MLP read the same residual stream (GPT-NeoX), in place of the size's."""
    qkv_bias: bool | None = None
    """Biases on queries, keys and values (Llama, as Qwen2 has them), in place of the size's."""
    qk_norm: bool | None = None
    """RMSNorm on each head's queries and keys (Llama, as Qwen3 has it), in place of the size's."""
    sliding_window: PositiveInt | None = None
    """Positions that each one sees, itself included (Llama, as Mistral has it), in place of the size's."""
    tie_embeddings: bool | None = None
    """One matrix for input embedding and output head (Llama), in place of the size's."""
