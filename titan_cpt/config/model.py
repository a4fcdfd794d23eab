"""The table [model]: architecture family, size and hyperparameters of the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from titan_cpt.common.plugins import FAMILIES
from titan_cpt.config.types import OneOf, PositiveFloat, PositiveInt, Table, validation_error

OWN_FAMILIES = ("gpt_neox", "llama", "olmo", "smollm3", "gemma3")


class RopeScalingKeys(Table):
    """The keys of a RoPE scaling, in [model.rope_scaling] and in a stage's `rope`."""

    kind: Literal["linear", "llama3", "yarn", "none"] | None = None
    """The scaling rule: linear (position interpolation), that of Llama 3.1, or YaRN; none: no scaling. Unset: the
    scaling of the weights is kept."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Context-extension factor, by which long wavelengths (linear: all) are multiplied. Unset: kind does not scale."""
    original_seq_len: PositiveInt | None = None
    """llama3 and yarn: context length in tokens before the extension. Unset: kind does not need it."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths above original_seq_len / low_freq_factor are multiplied by the whole factor. Unset: 1."""
    high_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths below original_seq_len / high_freq_factor are not changed. Unset: 4."""
    beta_fast: PositiveFloat | None = None
    """yarn: dimensions that rotate more than beta_fast times within original_seq_len are not changed. Unset: 32."""
    beta_slow: PositiveFloat | None = None
    """yarn: dimensions that rotate fewer than beta_slow times within original_seq_len are scaled by the whole factor.
    Unset: 1."""
    attention_factor: PositiveFloat | None = None
    """yarn: factor on cosine and sine. Unset: 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _only_keys_of_its_kind(self) -> RopeScalingKeys:
        own: dict[str | None, tuple[str, ...]] = {
            "linear": ("factor",),
            "llama3": ("factor", "original_seq_len", "low_freq_factor", "high_freq_factor"),
            "yarn": ("factor", "original_seq_len", "beta_fast", "beta_slow", "attention_factor"),
        }
        names = dict.fromkeys(name for each in own.values() for name in each)
        given = [name for name in names if getattr(self, name) is not None]
        if self.kind is None and given:
            raise validation_error(f'{", ".join(given)} needs a kind: add kind = "yarn" or kind = "llama3"')
        if self.kind == "none" and given:
            raise validation_error(f'kind = "none" removes the scaling and has no {", ".join(given)}')
        if self.kind in own and (foreign := [name for name in given if name not in own[self.kind]]):
            allowed = ", ".join(own[self.kind])
            raise validation_error(f'kind = "{self.kind}" has no {", ".join(foreign)}; allowed are {allowed}')
        return self


class RopeScalingConfig(RopeScalingKeys):
    """[model.rope_scaling]: RoPE scaling for context extension (linear, Llama 3's or YaRN)."""

    kind: Literal["linear", "llama3", "yarn"]
    """The scaling rule: linear (position interpolation), that of Llama 3.1, or YaRN."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """Context-extension factor, by which long wavelengths (linear: all) are multiplied."""
    original_seq_len: PositiveInt | None = None
    """llama3 and yarn, which need it: context length in tokens before the extension. Unset: kind is linear."""

    @model_validator(mode="after")
    def _has_the_length_that_its_kind_needs(self) -> RopeScalingConfig:
        if self.kind != "linear" and self.original_seq_len is None:
            raise validation_error(f'original_seq_len is missing: kind = "{self.kind}" needs it')
        return self


class StageRopeConfig(RopeScalingKeys):
    """[stages.rope]: RoPE of the weights from this stage on; a key that is not set keeps the value of its weights."""

    base: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Base of the RoPE frequencies (theta): adjusted base frequency (ABF). Unset: that of the weights."""

    @model_validator(mode="after")
    def _changes_something(self) -> StageRopeConfig:
        if self.base is None and self.kind is None:
            raise validation_error('is empty: set base, or kind = "yarn" or "llama3" with its keys, or both')
        needed = ("factor",) if self.kind == "linear" else ("factor", "original_seq_len")
        missing = [name for name in needed if getattr(self, name) is None]
        if self.kind == "linear" and missing:
            raise validation_error('kind = "linear" needs factor, such as rope = { kind = "linear", factor = 4.0 }')
        if self.kind in ("llama3", "yarn") and missing:
            raise validation_error(
                f'kind = "{self.kind}" needs {" and ".join(missing)}; to extend 4096 trained tokens to 16384: '
                f'rope = {{ kind = "{self.kind}", factor = 4.0, original_seq_len = 4096 }}'
            )
        return self


class ModelConfig(Table):
    """[model]: a named model size; the keys below `size` override its hyperparameters one by one."""

    family: Annotated[str, OneOf(OWN_FAMILIES, FAMILIES)]
    """Architecture family: one of these, or one that an installed package registers (titan_cpt.families)."""
    size: str
    """A named size of the family, such as "410m", "10b", "llama3.1-8b" or, for a CPU, "debug", "tiny", "mini"."""
    layers: PositiveInt | None = None
    """Number of transformer blocks."""
    width: PositiveInt | None = None
    """Model dimension (hidden size)."""
    heads: PositiveInt | None = None
    """Number of attention heads (query heads)."""
    kv_heads: PositiveInt | None = None
    """Number of key/value heads (grouped-query attention; not in GPT-NeoX)."""
    head_width: PositiveInt | None = None
    """Dimension of one attention head (not in GPT-NeoX). Unset: the size's, or width / heads."""
    query_pre_attn_scalar: PositiveFloat | None = None
    """Attention scores are multiplied by query_pre_attn_scalar^-0.5 (Gemma 3). Unset: the size's, or head_width."""
    mlp_width: PositiveInt | None = None
    """Inner dimension of the MLP (intermediate size)."""
    vocab_size: PositiveInt | None = None
    """Rows of the token embedding, used without padding. Unset: the size's, or the tokenizer's vocabulary padded."""
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of each head's dimensions to which RoPE is applied (GPT-NeoX family)."""
    rope_base: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Base of the RoPE frequencies (theta); in Gemma 3 of global layers."""
    local_rope_base: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Base of the RoPE frequencies in local layers, those with the sliding window (Gemma 3). Unset: 10,000."""
    rope_scaling: RopeScalingConfig | None = None
    """RoPE scaling for context extension. Unset: the size's, or none."""
    norm_eps: PositiveFloat | None = None
    """Epsilon of LayerNorm or RMSNorm."""
    parallel_residual: bool | None = None
    """Parallel residual: attention and MLP read the same input, and both outputs are added to it (GPT-NeoX family)."""
    qkv_bias: bool | None = None
    """Bias on the query, key and value projections (Llama family; Qwen2 has it)."""
    qk_norm: bool | None = None
    """RMSNorm on the queries and keys of each head (Llama family; Qwen3 has it)."""
    sliding_window: PositiveInt | None = None
    """Sliding-window attention: each token attends to itself and the sliding_window - 1 tokens before it (Mistral;
    OLMo 3 and Gemma 3, see global_interval). Unset: the size's, or full causal attention."""
    global_interval: PositiveInt | None = None
    """Every global_interval-th layer has full causal attention, the others have the sliding window (OLMo, Gemma 3).
    Unset: the size's; in OLMo, or all layers have the window."""
    nope_interval: PositiveInt | None = None
    """Layers without rotary positions (NoPE): every nope_interval-th layer (SmolLM3). Unset: 4."""
    tie_embeddings: bool | None = None
    """Tie the output head to the token embedding (not in GPT-NeoX)."""
    options: dict[str, Any] | None = None
    """Hyperparameters that only a registered family has, by the names in its spec."""

    @model_validator(mode="after")
    def _options_are_of_a_registered_family(self) -> ModelConfig:
        if self.options is not None and self.family in OWN_FAMILIES:
            raise validation_error(f'options are for registered families: "{self.family}" has the keys of [model]')
        if known := sorted(set(self.options or ()) & set(ModelConfig.model_fields)):
            raise validation_error(f"options: {', '.join(known)}: set as a key of [model], not in options")
        return self
