"""Hyperparameters, named sizes, parameters and activation memory of OLMo 2 and OLMo 3. Does not import torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from titan_cpt.models.grouped_query_spec import GroupedQuerySpec
from titan_cpt.models.spec import ActivationBytes, ParameterSpec, Rope, RopeScaling

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoSpec(GroupedQuerySpec):
    """Hyperparameters of an OLMo 2 or OLMo 3 model."""

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
        fields = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "mlp_width": mlp_width}
        fields["head_width"] = cls.equal_head_width(width, heads, overrides)
        return vocab, {**fields, "rope_base": 500_000.0, "norm_eps": 1e-6, **more}

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

    def activation_bytes_per_token(self, *, tp: int, cp: int, dtype_bytes: int) -> ActivationBytes:
        """Activation memory of one block per token: `block_activations` with, for the norms,

            2 (A + K)    queries and keys before and after normalization
            4 D          the same of the outputs of attention and MLP

        torch.compile saves the inputs only.
        """
        normed = 4 * self.width + 2 * (self.attention_width + self.kv_width)
        return self.block_activations(
            tp=tp, cp=cp, dtype_bytes=dtype_bytes, norms=4, normed=normed, normed_compiled=normed / 2
        )

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.global_interval is not None and self.sliding_window is None:
            problems.append("model.global_interval: needs model.sliding_window, the window of the other layers")
        if self.global_interval == 1:
            problems.append("model.global_interval: must be 2 or more, because with 1 no layer has the sliding window")
        return problems


SPEC = OlmoSpec
