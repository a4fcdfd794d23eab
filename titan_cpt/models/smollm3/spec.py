"""Hyperparameters and named sizes of SmolLM3, a Llama with layers without rotary positions. Does not import torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from titan_cpt.models.llama.spec import LlamaSpec

_SIZES: Mapping[str, tuple[int, int, int, int, int, int | None, float]] = {
    # size: (layers, width, heads, key/value heads, MLP width, padded vocabulary of the release, base of RoPE)
    "debug": (4, 64, 2, 1, 192, None, 10_000.0),
    "tiny": (4, 128, 4, 2, 384, None, 10_000.0),
    "mini": (8, 256, 8, 4, 704, None, 10_000.0),
    # SmolLM3-3B and SmolLM3-3B-Base on the hub; the base is that after the extension to 65,536 tokens
    # (https://huggingface.co/blog/smollm3: "raising RoPE theta to 5M")
    "3b": (36, 2048, 16, 4, 11_008, 128_256, 5_000_000.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Spec(LlamaSpec):
    """Hyperparameters of a SmolLM3 model: those of a Llama, and which layers have no rotary positions.

    A sliding window, which no release has, belongs to the layers without rotary positions, as in transformers.
    """

    nope_interval: int = 4
    """Layer i, from 0, has no rotary positions if (i + 1) % nope_interval == 0 (NoPE: Yang et al. 2025,
    arXiv:2501.18795)."""

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
        layers, width, heads, kv_heads, mlp_width, vocab, rope_base = _SIZES[size]
        fields = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "mlp_width": mlp_width}
        fields["head_width"] = cls.equal_head_width(width, heads, overrides)
        return vocab, {**fields, "rope_base": rope_base, "norm_eps": 1e-6, "tie_embeddings": True}

    def layer_rope(self, layer: int) -> int | None:
        """Which of `ropes` a layer has; None: none."""
        return None if (layer + 1) % self.nope_interval == 0 else 0

    def layer_window(self, layer: int) -> int | None:
        """Sliding-window size of a layer in tokens; None: full causal attention."""
        return self.sliding_window if self.layer_rope(layer) is None else None

    def _problems(self) -> list[str]:
        foreign = [name for name in ("qkv_bias", "qk_norm") if getattr(self, name)]
        return [f"model.{name}: must be false in the family smollm3" for name in foreign] + super()._problems()


SPEC = SmolLM3Spec
