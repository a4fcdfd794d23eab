"""Hyperparameters, named sizes, parameters and activation memory of OLMo 2 and OLMo 3. Does not import torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from titan_cpt.errors import ConfigError
from titan_cpt.models.spec import ActivationBytes, ModelSpec, ParameterSpec, Rope, RopeScaling, rope_scaling_problems

_OLMO3 = {"sliding_window": 4096, "global_interval": 4}
_LONG = {**_OLMO3, "rope_scaling": RopeScaling(kind="yarn", factor=8.0, original_seq_len=8192)}

_SIZES: Mapping[str, tuple[int, int, int, int, int, int | None, Mapping[str, Any]]] = {
    # size: (layers, width, heads, key/value heads, MLP width, vocabulary of the release, other fields)
    "debug": (2, 64, 2, 1, 192, None, {}),
    "tiny": (4, 128, 4, 2, 384, None, {}),
    "mini": (6, 256, 8, 4, 704, None, {}),
    # OLMo team 2025, arXiv:2501.00656, and config.json of OLMo-2-0425-1B, -1124-7B, -1124-13B and -0325-32B
    "olmo2-1b": (16, 2048, 16, 16, 8192, 100_352, {}),
    "olmo2-7b": (32, 4096, 32, 32, 11_008, 100_352, {}),
    "olmo2-13b": (40, 5120, 40, 40, 13_824, 100_352, {}),
    "olmo2-32b": (64, 5120, 40, 8, 27_648, 100_352, {}),
    # config.json of Olmo-3-1025-7B and Olmo-3-1125-32B: first before, then after the extension to 65,536 tokens
    "olmo3-7b": (32, 4096, 32, 32, 11_008, 100_278, _OLMO3),
    "olmo3-32b": (64, 5120, 40, 8, 27_648, 100_278, _OLMO3),
    "olmo3-7b-long": (32, 4096, 32, 32, 11_008, 100_278, _LONG),
    "olmo3-32b-long": (64, 5120, 40, 8, 27_648, 100_278, _LONG),
}

_FP32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoSpec(ModelSpec):
    """Hyperparameters of an OLMo 2 or OLMo 3 model."""

    kv_heads: int
    """Number of key/value heads (grouped-query attention): heads / kv_heads query heads share each of them."""
    head_width: int
    """Features of one attention head (H), even; width / heads in all releases."""
    tie_embeddings: bool = False
    """The output head uses the weight of the input embedding; not in a release."""
    sliding_window: int | None = None
    """In layers with a sliding window each token attends to itself and the sliding_window - 1 tokens before it; None:
    full causal attention in all layers (OLMo 2)."""
    global_interval: int | None = None
    """Layer i, from 0, has full causal attention if (i + 1) % global_interval == 0, else the sliding window; None: all
    layers have the sliding window, if there is one."""
    rope_scaling: RopeScaling | None = None
    """RoPE scaling for context extension of the layers with full attention; None: none."""

    @classmethod
    def sizes(cls) -> tuple[str, ...]:
        """Names of the family's sizes."""
        return tuple(_SIZES)

    @classmethod
    def size_fields(cls, size: str, overrides: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
        """The fields of a named size; a head has width / heads features unless an override sets it.

        Raises:
            ConfigError: the head width is width / heads, and heads do not divide width.
        """
        layers, width, heads, kv_heads, mlp_width, vocab, more = _SIZES[size]
        width_now, heads_now = overrides.get("width", width), overrides.get("heads", heads)
        if "head_width" not in overrides and heads_now > 0 and width_now % heads_now:
            raise ConfigError(
                f"model.heads: must divide model.width = {width_now} if model.head_width is not set, got {heads_now}"
            )
        fields = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "mlp_width": mlp_width}
        fields |= {"head_width": width_now // max(heads_now, 1)}
        return vocab, {**fields, "rope_base": 500_000.0, "norm_eps": 1e-6, **more}

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

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """That of the layers with full attention; if there is a sliding window, also its layers', without scaling."""
        return (self.rope,) if self.sliding_window is None else (self.rope, Rope(self.rope_base))

    def layer_rope(self, layer: int) -> int:
        """Which of `ropes` a layer has."""
        return 0 if self.layer_window(layer) is None else 1

    def layer_window(self, layer: int) -> int | None:
        """Sliding-window size of a layer in tokens; None: full causal attention."""
        is_global = self.global_interval is not None and (layer + 1) % self.global_interval == 0
        return None if is_global else self.sliding_window

    def block_parameters(self) -> tuple[ParameterSpec, ...]:
        """Every parameter of one transformer block."""
        d, a, k, f = self.width, self.attention_width, self.kv_width, self.mlp_width
        return (
            ParameterSpec("attention.q.weight", (a, d), 0),
            ParameterSpec("attention.k.weight", (k, d), 0),
            ParameterSpec("attention.v.weight", (k, d), 0),
            ParameterSpec("attention.q_norm.weight", (a,), 0),
            ParameterSpec("attention.k_norm.weight", (k,), 0),
            ParameterSpec("attention.out.weight", (d, a), 1),
            ParameterSpec("post_attention_norm.weight", (d,), None),
            ParameterSpec("mlp.gate.weight", (f, d), 0),
            ParameterSpec("mlp.up.weight", (f, d), 0),
            ParameterSpec("mlp.down.weight", (d, f), 1),
            ParameterSpec("post_mlp_norm.weight", (d,), None),
        )

    def final_norm_parameters(self) -> tuple[ParameterSpec, ...]:
        """Scale of the final RMSNorm."""
        return (ParameterSpec("final_norm.weight", (self.width,), None),)

    def activation_bytes_per_token(self, *, tp: int, cp: int, dtype_bytes: int) -> ActivationBytes:
        """Activation memory of one block per token, the sum of these elements:

            2 D          all-gathered inputs of attention and MLP
            A/t          rotated queries
            2 K/t        rotated keys, and values (*)
            A/t          attention's output
            4 F/t        the MLP's gate before and after SiLU, up, and their product
            2 (A + K)/t  fp32: queries and keys before and after normalization (a fused kernel saves half)
            4 D/t        fp32: the same of the outputs of attention and MLP

        and, in fp32, the statistics of the four RMSNorms and of attention. D, A, K and F are the widths of model,
        queries, keys and MLP; t is the tensor-parallel degree.
        (*) 2 A/t in layers with a sliding window or with context parallelism, where keys and values are repeated for
        their query heads; times cp, as keys and values are all-gathered.

        Selective checkpointing per operator saves only the block's input and the outputs of `q`, `v`, `gate`, `down` (D
        elements: it is not reduce-scattered yet) and attention.

        torch.compile saves the inputs of the four norms in the compute dtype, and 3 F/t: the MLP without the gate after
        SiLU.
        """
        d, a, k, f = self.width, self.attention_width, self.kv_width, self.mlp_width
        statistics = (4 + self.heads) / tp * _FP32_BYTES
        repeated = 1.0 if cp > 1 else self.windowed_share
        keys_and_values = cp * 2 * (repeated * a + (1 - repeated) * k)
        normed = 4 * d + 2 * (a + k)
        unchecked = (
            dtype_bytes * (2 * d + (2 * a + keys_and_values + 4 * f) / tp) + _FP32_BYTES * normed / tp + statistics
        )
        selective_op = dtype_bytes * (d + (d + 2 * a + k + f) / tp) + self.heads / tp * _FP32_BYTES
        compiled = dtype_bytes * (2 * d + (2 * a + keys_and_values + 3 * f + normed / 2) / tp) + statistics
        return ActivationBytes(unchecked, selective_op, compiled)

    def _problems(self) -> list[str]:
        problems = []
        if self.heads % self.kv_heads:
            problems.append(f"model.kv_heads: must divide model.heads = {self.heads}, got {self.kv_heads}")
        if self.head_width % 2:
            problems.append(
                f"model.head_width: must be even, because RoPE rotates pairs of features, got {self.head_width}"
            )
        if self.global_interval is not None and self.sliding_window is None:
            problems.append("model.global_interval: needs model.sliding_window, the window of the other layers")
        if self.global_interval == 1:
            problems.append("model.global_interval: must be 2 or more, because with 1 no layer has the sliding window")
        return problems + (rope_scaling_problems(self.rope_scaling) if self.rope_scaling else [])


SPEC = OlmoSpec
