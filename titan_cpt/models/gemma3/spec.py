"""Hyperparameters, named sizes, parameters and activation memory of Gemma 3's text models. Does not import torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from titan_cpt.models.grouped_query_spec import GroupedQuerySpec
from titan_cpt.models.spec import ActivationBytes, ParameterSpec, Rope, RopeScaling

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Spec(GroupedQuerySpec):
    """Hyperparameters of a Gemma 3 text model."""

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

    def activation_bytes_per_token(self, *, tp: int, cp: int, dtype_bytes: int) -> ActivationBytes:
        """Activation memory of one block per token: `block_activations` with, for the norms,

            8 D          inputs of the four RMSNorms before and after normalization
            2 (A + K)    the same of the query and key norms

        torch.compile saves the inputs only, except that of the norm before the MLP, which is a sum of the others.
        """
        d, a, k = self.width, self.attention_width, self.kv_width
        return self.block_activations(
            tp=tp, cp=cp, dtype_bytes=dtype_bytes, norms=4, normed=8 * d + 2 * (a + k), normed_compiled=3 * d + a + k
        )


SPEC = Gemma3Spec
