"""Hyperparameters, named sizes, parameters and activation memory of GPT-NeoX models. Does not import torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from titan_cpt.models.spec import (
    RECORDED_IF_SET,
    ActivationBytes,
    ModelSpec,
    ParameterSpec,
    RopeScaling,
    rope_scaling_problems,
)

_SIZES: Mapping[str, tuple[int, int, int, int | None]] = {
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

_FP32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoXSpec(ModelSpec):
    """Hyperparameters of a GPT-NeoX model."""

    rotary_fraction: float = 0.25
    """Fraction of each head's features that is rotated, in (0, 1]."""
    parallel_residual: bool = True
    """True: attention and MLP both read the block's input. False: the MLP reads the residual stream after attention."""
    rope_scaling: RopeScaling | None = dataclasses.field(default=None, metadata=RECORDED_IF_SET)
    """RoPE scaling for context extension; None: none."""

    @classmethod
    def sizes(cls) -> tuple[str, ...]:
        """Names of the family's sizes."""
        return tuple(_SIZES)

    @classmethod
    def size_fields(cls, size: str, overrides: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
        """The fields of a named size; its MLP is 4 times as wide as the model."""
        layers, width, heads, vocab = _SIZES[size]
        return vocab, {"layers": layers, "width": width, "heads": heads, "mlp_width": 4 * overrides.get("width", width)}

    @property
    def head_width(self) -> int:
        """Features of one attention head (H)."""
        return self.width // self.heads

    @property
    def attention_width(self) -> int:
        """Features of all query heads together: the model's width."""
        return self.width

    @property
    def rotary_width(self) -> int:
        """Features of one head that are rotated; even."""
        return round(self.head_width * self.rotary_fraction)

    def block_parameters(self) -> tuple[ParameterSpec, ...]:
        """Every parameter of one transformer block."""
        d, f = self.width, self.mlp_width
        return (
            ParameterSpec("attention_norm.weight", (d,), None),
            ParameterSpec("attention_norm.bias", (d,), None),
            ParameterSpec("mlp_norm.weight", (d,), None),
            ParameterSpec("mlp_norm.bias", (d,), None),
            ParameterSpec("attention.qkv.weight", (3 * d, d), 0),
            ParameterSpec("attention.qkv.bias", (3 * d,), 0),
            ParameterSpec("attention.out.weight", (d, d), 1),
            ParameterSpec("attention.out.bias", (d,), None),
            ParameterSpec("mlp.up.weight", (f, d), 0),
            ParameterSpec("mlp.up.bias", (f,), 0),
            ParameterSpec("mlp.down.weight", (d, f), 1),
            ParameterSpec("mlp.down.bias", (d,), None),
        )

    def final_norm_parameters(self) -> tuple[ParameterSpec, ...]:
        """Scale and shift of the final LayerNorm."""
        return (
            ParameterSpec("final_norm.weight", (self.width,), None),
            ParameterSpec("final_norm.bias", (self.width,), None),
        )

    def activation_bytes_per_token(self, *, tp: int, cp: int, dtype_bytes: int) -> ActivationBytes:
        """Activation memory of one block per token, the sum of these elements (D width, F MLP width, t TP degree):

            D/t     the block's input, which both LayerNorms read; without parallel residual 2 D/t
            2 D     all-gathered inputs of attention and MLP
            3 D/t   values, rotated queries and keys
            D/t     attention's output
            2 F/t   the MLP before and after GELU

        and, in fp32, the statistics of LayerNorm and attention. Selective checkpointing per operator saves only the
        block's input and the outputs of `qkv`, `up` and attention. torch.compile saves the same as eager execution.
        """
        d, f = self.width, self.mlp_width
        statistics = (4 / tp + self.heads / tp) * _FP32_BYTES
        normed = d if self.parallel_residual else 2 * d
        unchecked = dtype_bytes * (2 * d + (4 * d + normed + 2 * f) / tp) + statistics
        selective_op = dtype_bytes * (5 * d / tp + f / tp) + self.heads / tp * _FP32_BYTES
        return ActivationBytes(unchecked, selective_op, compiled=unchecked)

    def _problems(self) -> list[str]:
        problems = []
        if self.width % self.heads:
            problems.append(f"model.heads: must divide model.width = {self.width}, got {self.heads}")
        rotated = self.head_width * self.rotary_fraction
        if not 0 < self.rotary_fraction <= 1 or abs(rotated / 2 - round(rotated / 2)) > 1e-9 or rotated < 2:
            problems.append(
                f"model.rotary_fraction: must be in (0, 1] and rotate an even number of the {self.head_width} features "
                f"of a head, got {self.rotary_fraction} ({rotated:g} features)"
            )
        return problems + (rope_scaling_problems(self.rope_scaling) if self.rope_scaling else [])


SPEC = GPTNeoXSpec
