"""Hyperparameters that the families with grouped-query attention, RMSNorm and a gated MLP share. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from titan_cpt.errors import ConfigError
from titan_cpt.models.spec import ActivationBytes, ModelSpec, ParameterSpec, RopeScaling, rope_scaling_problems

_FP32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedQuerySpec(ModelSpec):
    """Hyperparameters of a model with grouped-query attention, RMSNorm and a gated MLP without biases."""

    kv_heads: int
    """Number of key/value heads (grouped-query attention): heads / kv_heads query heads share each of them."""
    head_width: int
    """Features of one attention head (H), even."""
    tie_embeddings: bool = False
    """The output head uses the weight of the input embedding."""
    rope_scaling: RopeScaling | None = None
    """RoPE scaling for context extension; None: none."""

    @classmethod
    def equal_head_width(cls, width: int, heads: int, overrides: Mapping[str, Any]) -> int:
        """Width / heads of a size whose overrides may replace both; of no meaning if they set the head width.

        Raises:
            ConfigError: the overrides do not set it, and heads do not divide width.
        """
        width, heads = overrides.get("width", width), overrides.get("heads", heads)
        if "head_width" not in overrides and heads > 0 and width % heads:
            raise ConfigError(
                f"model.heads: must divide model.width = {width} if model.head_width is not set, got {heads}"
            )
        return width // max(heads, 1)

    @property
    def attention_width(self) -> int:
        """Features of all query heads together (N x H)."""
        return self.heads * self.head_width

    @property
    def rotary_width(self) -> int:
        """Features of one head that are rotated: all of them."""
        return self.head_width

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads."""
        return self.kv_heads

    @property
    def tied(self) -> bool:
        """Whether the output head uses the weight of the input embedding."""
        return self.tie_embeddings

    def final_norm_parameters(self) -> tuple[ParameterSpec, ...]:
        """Scale of the final RMSNorm."""
        return (ParameterSpec("final_norm.weight", (self.width,), None),)

    def block_activations(
        self, *, tp: int, cp: int, dtype_bytes: int, norms: int, normed: int, normed_compiled: float
    ) -> ActivationBytes:
        """Activation memory of one block per token, the sum of these elements:

            2 D          all-gathered inputs of attention and MLP
            A/t          rotated queries
            2 K/t        rotated keys, and values (*)
            A/t          attention's output
            4 F/t        the MLP's gate before and after its activation function, up, and their product
            `normed`/t   fp32: inputs of the RMSNorms before and after normalization (a fused kernel saves half)

        and, in fp32, the statistics of `norms` RMSNorms over the width and of attention. D, A, K and F are the widths
        of model, queries, keys and MLP; t is the tensor-parallel degree.
        (*) 2 A/t with a sliding window or context parallelism, where keys and values are repeated for their query
        heads; times cp, as keys and values are all-gathered. If only some layers have a window: the average.

        Selective checkpointing per operator saves only the block's input and the outputs of `q`, `v`, `gate`, `down` (D
        elements: it is not reduce-scattered yet) and attention.

        torch.compile saves `normed_compiled` elements of inputs of the norms, in the compute dtype, and 3 F/t: the MLP
        without the gate after its activation function.
        """
        d, a, k, f = self.width, self.attention_width, self.kv_width, self.mlp_width
        statistics = (norms + self.heads) / tp * _FP32_BYTES
        masked = 1.0 if cp > 1 else self.windowed_share
        keys_and_values = cp * 2 * (masked * a + (1 - masked) * k)
        unchecked = (
            dtype_bytes * (2 * d + (2 * a + keys_and_values + 4 * f) / tp) + _FP32_BYTES * normed / tp + statistics
        )
        selective_op = dtype_bytes * (d + (d + 2 * a + k + f) / tp) + self.heads / tp * _FP32_BYTES
        compiled = dtype_bytes * (2 * d + (2 * a + keys_and_values + 3 * f + normed_compiled) / tp) + statistics
        return ActivationBytes(unchecked, selective_op, compiled)

    def _problems(self) -> list[str]:
        problems = []
        if self.heads % self.kv_heads:
            problems.append(f"model.kv_heads: must divide model.heads = {self.heads}, got {self.kv_heads}")
        if self.head_width % 2:
            problems.append(
                f"model.head_width: must be even, because RoPE rotates pairs of features, got {self.head_width}"
            )
        return problems + (rope_scaling_problems(self.rope_scaling) if self.rope_scaling else [])
