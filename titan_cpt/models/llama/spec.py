"""Hyperparameters, named sizes, parameters and activation memory of Llama, Mistral and Qwen. Does not import torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from titan_cpt.models.grouped_query_spec import GroupedQuerySpec
from titan_cpt.models.spec import ActivationBytes, ParameterSpec, RopeScaling

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

_SIZES: Mapping[str, tuple[int, int, int, int, int, int | None, Mapping[str, Any]]] = {
    # size: (layers, width, heads, key/value heads, MLP width, padded vocabulary of the release, other fields)
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
    # Jiang et al. 2023, arXiv:2310.06825 (v0.1); v0.3 has no sliding window and a larger vocabulary
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaSpec(GroupedQuerySpec):
    """Hyperparameters of a Llama, Mistral, Qwen2 or Qwen3 model."""

    qkv_bias: bool = False
    """Biases of the query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys before they are rotated (Qwen3)."""
    sliding_window: int | None = None
    """Each token attends to itself and the sliding_window - 1 tokens before it; None: full causal attention."""

    @classmethod
    def sizes(cls) -> tuple[str, ...]:
        """Names of the family's sizes."""
        return tuple(_SIZES)

    @classmethod
    def size_fields(cls, size: str, overrides: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
        """The fields of a named size; a head has width / heads features unless the size (Qwen3) or an override sets it.

        Raises:
            ConfigError: the head width is width / heads, and heads do not divide width.
        """
        layers, width, heads, kv_heads, mlp_width, vocab, more = _SIZES[size]
        fields = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "mlp_width": mlp_width}
        if "head_width" not in more:
            fields["head_width"] = cls.equal_head_width(width, heads, overrides)
        return vocab, fields | dict(more)

    def block_parameters(self) -> tuple[ParameterSpec, ...]:
        """Every parameter of one transformer block."""
        d, a, k, f = self.width, self.attention_width, self.kv_width, self.mlp_width
        head_norms = ("attention.q_norm", "attention.k_norm") if self.qk_norm else ()
        biases = (("q", a), ("k", k), ("v", k)) if self.qkv_bias else ()
        return (
            ParameterSpec("attention_norm.weight", (d,), None),
            ParameterSpec("mlp_norm.weight", (d,), None),
            *(ParameterSpec(f"{norm}.weight", (self.head_width,), None) for norm in head_norms),
            ParameterSpec("attention.q.weight", (a, d), 0),
            ParameterSpec("attention.k.weight", (k, d), 0),
            ParameterSpec("attention.v.weight", (k, d), 0),
            *(ParameterSpec(f"attention.{name}.bias", (width,), 0) for name, width in biases),
            ParameterSpec("attention.out.weight", (d, a), 1),
            ParameterSpec("mlp.gate.weight", (f, d), 0),
            ParameterSpec("mlp.up.weight", (f, d), 0),
            ParameterSpec("mlp.down.weight", (d, f), 1),
        )

    def activation_bytes_per_token(self, *, tp: int, cp: int, dtype_bytes: int) -> ActivationBytes:
        """Activation memory of one block per token: `block_activations` with, for the norms,

            4 D          inputs of both RMSNorms before and after normalization
            2 (A + K)    the same of the query and key norms (Qwen3)

        torch.compile saves the inputs only; the second norm's is kept as the output of `out`.
        """
        normed = 4 * self.width + (2 * (self.attention_width + self.kv_width) if self.qk_norm else 0)
        return self.block_activations(
            tp=tp, cp=cp, dtype_bytes=dtype_bytes, norms=2, normed=normed, normed_compiled=normed / 2
        )

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.qkv_bias and self.qk_norm:
            problems.append("model.qk_norm: must be false if model.qkv_bias is true: no released architecture has both")
        return problems


SPEC = LlamaSpec
