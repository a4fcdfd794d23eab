"""Hyperparameters, named sizes, parameters and activation memory of Gemma 3's text models. Does not import torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from titan_cpt.models.spec import ActivationBytes, ModelSpec, ParameterSpec, Rope, RopeScaling, rope_scaling_problems

_ROWS = 262_144
_LONG = {"rope_scaling": RopeScaling(kind="linear", factor=8.0)}

_SIZES: Mapping[str, tuple[int, int, int, int, int, int, int, int | None, Mapping[str, Any]]] = {
    # size: (layers, width, heads, key/value heads, head width, MLP width, window, rows of the embedding, other fields)
    "debug": (3, 64, 2, 1, 32, 192, 16, None, {"global_interval": 3}),
    "tiny": (6, 128, 4, 2, 32, 384, 64, None, {}),
    "mini": (6, 256, 8, 4, 32, 704, 128, None, {}),
    # Gemma 3 technical report, arXiv:2503.19786, section 2, and Google's configurations in
    # https://github.com/huggingface/transformers, src/transformers/models/gemma3/convert_gemma3_weights.py. From 4b on
    # the releases on the hub have 64 more rows, for the tokens of images.
    "270m": (18, 640, 4, 1, 256, 2048, 512, _ROWS, {}),
    "1b": (26, 1152, 4, 1, 256, 6912, 512, _ROWS, {}),
    "4b": (34, 2560, 8, 4, 256, 10_240, 1024, _ROWS, _LONG),
    "12b": (48, 3840, 16, 8, 256, 15_360, 1024, _ROWS, _LONG),
    "27b": (62, 5376, 32, 16, 128, 21_504, 1024, _ROWS, _LONG | {"query_pre_attn_scalar": 168.0}),
}

_FP32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Spec(ModelSpec):
    """Hyperparameters of a Gemma 3 text model."""

    kv_heads: int
    """Number of key/value heads (grouped-query attention): heads / kv_heads query heads share each of them."""
    head_width: int
    """Features of one attention head (H), even."""
    query_pre_attn_scalar: float
    """The scores are multiplied by query_pre_attn_scalar^-0.5; head_width in most sizes."""
    sliding_window: int = 1024
    """In a local layer each token attends to itself and the sliding_window - 1 tokens before it."""
    global_interval: int = 6
    """Layer i, from 0, is global if (i + 1) % global_interval == 0: full causal attention. The others are local."""
    local_rope_base: float = 10_000.0
    """Base of the rotary wavelengths in local layers, which are not scaled; rope_base is that of global layers."""
    tie_embeddings: bool = True
    """The output head uses the weight of the input embedding."""
    rope_scaling: RopeScaling | None = None
    """RoPE scaling of global layers for context extension; None: none."""

    @classmethod
    def sizes(cls) -> tuple[str, ...]:
        """Names of the family's sizes."""
        return tuple(_SIZES)

    @classmethod
    def size_fields(cls, size: str, overrides: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
        """The fields of a named size; except in 27b, query_pre_attn_scalar follows the head width."""
        layers, width, heads, kv_heads, head_width, mlp_width, window, rows, more = _SIZES[size]
        fields = {
            "layers": layers,
            "width": width,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_width": head_width,
            "mlp_width": mlp_width,
            "sliding_window": window,
            "query_pre_attn_scalar": float(overrides.get("head_width", head_width)),
            "rope_base": 1_000_000.0,
            "norm_eps": 1e-6,
        }
        return rows, fields | dict(more)

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
        """Of global layers, which a stage can change, and of local ones."""
        return (self.rope, Rope(self.local_rope_base))

    def is_global(self, layer: int) -> bool:
        """Whether a layer has full causal attention."""
        return (layer + 1) % self.global_interval == 0

    def layer_rope(self, layer: int) -> int | None:
        """Which of `ropes` a layer has."""
        return 0 if self.is_global(layer) else 1

    def layer_window(self, layer: int) -> int | None:
        """Sliding-window size of a layer in tokens; None: full causal attention."""
        return None if self.is_global(layer) else self.sliding_window

    def block_parameters(self) -> tuple[ParameterSpec, ...]:
        """Every parameter of one transformer block."""
        d, a, k, f = self.width, self.attention_width, self.kv_width, self.mlp_width
        return (
            ParameterSpec("attention_norm.weight", (d,), None),
            ParameterSpec("post_attention_norm.weight", (d,), None),
            ParameterSpec("mlp_norm.weight", (d,), None),
            ParameterSpec("post_mlp_norm.weight", (d,), None),
            ParameterSpec("attention.q_norm.weight", (self.head_width,), None),
            ParameterSpec("attention.k_norm.weight", (self.head_width,), None),
            ParameterSpec("attention.q.weight", (a, d), 0),
            ParameterSpec("attention.k.weight", (k, d), 0),
            ParameterSpec("attention.v.weight", (k, d), 0),
            ParameterSpec("attention.out.weight", (d, a), 1),
            ParameterSpec("mlp.gate.weight", (f, d), 0),
            ParameterSpec("mlp.up.weight", (f, d), 0),
            ParameterSpec("mlp.down.weight", (d, f), 1),
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
            4 F/t        the MLP's gate before and after GELU, up, and their product
            8 D/t        fp32: inputs of the four RMSNorms before and after normalization (a fused kernel saves half)
            2 (A + K)/t  fp32: the same of the query and key norms

        and, in fp32, the statistics of the four RMSNorms and of attention. D, A, K and F are the widths of model,
        queries, keys and MLP; t is the tensor-parallel degree.
        (*) 2 A/t in local layers and under context parallelism, where keys and values are repeated for their query
        heads; times cp, as keys and values are all-gathered. The result is the average over local and global layers.

        Selective checkpointing per operator saves only the block's input and the outputs of `q`, `v`, `gate`, `down` (D
        elements: it is not reduce-scattered yet) and attention.

        torch.compile saves the inputs of the norms in the compute dtype and only before normalization, except that of
        the norm before the MLP, which is a sum of the others; and 3 F/t, the MLP without the gate after GELU.
        """
        d, a, k, f = self.width, self.attention_width, self.kv_width, self.mlp_width
        statistics = (4 + self.heads) / tp * _FP32_BYTES
        masked = 1.0 if cp > 1 else self.windowed_share
        keys_and_values = cp * 2 * (masked * a + (1 - masked) * k)
        normed = 8 * d + 2 * (a + k)
        unchecked = (
            dtype_bytes * (2 * d + (2 * a + keys_and_values + 4 * f) / tp) + _FP32_BYTES * normed / tp + statistics
        )
        selective_op = dtype_bytes * (d + (d + 2 * a + k + f) / tp) + self.heads / tp * _FP32_BYTES
        inputs = 3 * d + a + k
        compiled = dtype_bytes * (2 * d + (2 * a + keys_and_values + 3 * f + inputs) / tp) + statistics
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


SPEC = Gemma3Spec
