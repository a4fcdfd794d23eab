"""Where our weights are in GPT-NeoX's models, and how the parts of its tensor-parallel ranks become one tensor.

A model is a sequence: 0 the embedding, 2 to layers + 1 the blocks, layers + 3 the final norm, layers + 4 the head.
Sources: megatron/model/gpt2_model.py, transformer.py of GPT-NeoX ea7aefd8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_cpt.models.llama.spec import LlamaSpec
from titan_cpt.models.spec import ModelSpec

NEOX_EMBEDDING = "0.word_embeddings.weight"
_QKV = "attention.query_key_value"
_UP = ("mlp.linear1", "mlp.dense_h_to_4h")  # now, and before
_DOWN = ("mlp.linear2", "mlp.dense_4h_to_h")
_GATED = ("mlp.w1.weight", "mlp.w3.weight", "mlp.w2.weight")  # gate, up and down of Llama's MLP, before
_COLUMNS = tuple(f"{layer}.weight" for layer in ("attention.dense", *_DOWN)) + _GATED[2:]
_ROWS = (
    *("word_embeddings.weight", "final_linear.weight", *_GATED[:2]),
    *(f"{layer}.{kind}" for layer in (_QKV, *_UP) for kind in ("weight", "bias")),
)
_SUMMED = tuple(f"{layer}.bias" for layer in ("attention.dense", *_DOWN))


@dataclass(frozen=True)
class NeoxPlace:
    """Where a weight is: a whole tensor of GPT-NeoX, or a part of it.

    Attributes:
        names: the names that the tensor can have.
        part: "q", "k" or "v" of a fused QKV tensor; "gate" or "up" of a fused SwiGLU tensor; "": the whole tensor.
    """

    names: tuple[str, ...]
    part: str = ""


def places(spec: ModelSpec) -> dict[str, tuple[NeoxPlace, ...]]:
    """Our name of every weight -> where it can be in the whole model."""
    found: dict[str, tuple[NeoxPlace, ...]] = {"embedding.weight": (NeoxPlace((NEOX_EMBEDDING,)),)}
    block = dict(_llama_block() if isinstance(spec, LlamaSpec) else _gpt_neox_block())
    for layer in range(spec.layers):
        for ours, places in block.items():
            found[f"blocks.{layer}.{ours}"] = tuple(
                NeoxPlace(tuple(f"{layer + 2}.{name}" for name in place.names), place.part) for place in places
            )
    norm = {"weight": "scale"} if isinstance(spec, LlamaSpec) else {"weight": "weight", "bias": "bias"}
    for ours, theirs in norm.items():
        found[f"final_norm.{ours}"] = (NeoxPlace((f"{spec.layers + 3}.norm.{theirs}",)),)
    if not spec.tied:
        found["head.weight"] = (NeoxPlace((f"{spec.layers + 4}.final_linear.weight",)),)
    return found


def _gpt_neox_block() -> Iterator[tuple[str, tuple[NeoxPlace, ...]]]:
    for kind in ("weight", "bias"):
        yield f"attention_norm.{kind}", (NeoxPlace((f"input_layernorm.{kind}",)),)
        yield f"attention.qkv.{kind}", (NeoxPlace((f"{_QKV}.{kind}",)),)
        yield f"attention.out.{kind}", (NeoxPlace((f"attention.dense.{kind}",)),)
        yield f"mlp_norm.{kind}", (NeoxPlace((f"post_attention_layernorm.{kind}",)),)
        yield f"mlp.up.{kind}", (NeoxPlace(tuple(f"{name}.{kind}" for name in _UP)),)
        yield f"mlp.down.{kind}", (NeoxPlace(tuple(f"{name}.{kind}" for name in _DOWN)),)


def _llama_block() -> Iterator[tuple[str, tuple[NeoxPlace, ...]]]:
    yield "attention_norm.weight", (NeoxPlace(("input_layernorm.scale",)),)
    for part in "qkv":
        yield f"attention.{part}.weight", (NeoxPlace((f"{_QKV}.weight",), part),)
    yield "attention.out.weight", (NeoxPlace(("attention.dense.weight",)),)
    yield "mlp_norm.weight", (NeoxPlace(("post_attention_layernorm.scale",)),)
    yield "mlp.gate.weight", (NeoxPlace((f"{_UP[0]}.weight",), "gate"), NeoxPlace(_GATED[:1]))
    yield "mlp.up.weight", (NeoxPlace((f"{_UP[0]}.weight",), "up"), NeoxPlace(_GATED[1:2]))
    yield "mlp.down.weight", (NeoxPlace((f"{_DOWN[0]}.weight", _GATED[2])),)


def whole_shape(name: str, shape: Sequence[int], ranks: int) -> tuple[int, ...]:
    """The shape of `merge_parts` of as many parts of this shape."""
    dim = _dim(name)
    return tuple(length * (ranks if axis == dim else 1) for axis, length in enumerate(shape))


def _dim(name: str) -> int | None:
    if name.endswith(_ROWS):
        return 0
    return 1 if name.endswith(_COLUMNS) else None


def merge_parts(name: str, parts: Sequence[Tensor], spec: ModelSpec, *, summed: bool) -> Tensor:
    """A parameter from the parts of all tensor-parallel ranks.

    Rows of grouped-query attention and SwiGLU are, on each rank, its queries above its keys above its values, and
    its up projection above its gate: they are joined to those of the whole model.

    Args:
        summed: biases of the layers that write to the residual stream are summed, because each rank adds its own
            before the ranks' outputs are (parallel residual). Otherwise, and for moments, all ranks have the same.
    """
    if len(parts) == 1:
        return parts[0]
    dim = _dim(name)
    if dim is None:
        stack = torch.stack([part.float() for part in parts])
        return stack.sum(0) if summed and name.endswith(_SUMMED) else stack.mean(0)
    if isinstance(spec, LlamaSpec) and name.endswith(f"{_QKV}.weight") and spec.kv_heads != spec.heads:
        lengths = [heads * spec.head_width // len(parts) for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
        kinds = zip(*(torch.split(part, lengths) for part in parts), strict=True)
        return torch.cat([part for kind in kinds for part in kind])
    if isinstance(spec, LlamaSpec) and name.endswith(f"{_UP[0]}.weight"):
        return torch.cat([half for kind in zip(*(part.chunk(2) for part in parts), strict=True) for half in kind])
    return torch.cat(list(parts), dim)


def shape_of_part(part: str, shape: tuple[int, ...], spec: ModelSpec) -> tuple[int, ...]:
    """The shape of a part of a whole tensor of this shape."""
    if part in ("gate", "up") and shape and shape[0] % 2 == 0:
        return (shape[0] // 2, *shape[1:])
    if part and isinstance(spec, LlamaSpec) and shape and shape[0] == spec.attention_width + 2 * spec.kv_width:
        heads = spec.heads if part == "q" else spec.kv_heads
        return (shape[0] * heads // (spec.heads + 2 * spec.kv_heads), *shape[1:])
    return shape


def part_of(part: str, whole: Tensor, spec: ModelSpec) -> Tensor:
    """A part of a whole tensor.

    QKV has, with grouped-query attention, all queries, all keys, all values; otherwise those of one head after another.
    """
    if part in ("gate", "up"):
        return whole.chunk(2)[1 if part == "gate" else 0]
    if not part or not isinstance(spec, LlamaSpec):
        return whole
    number = "qkv".index(part)
    if spec.kv_heads != spec.heads:
        lengths = [heads * spec.head_width for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
        return torch.split(whole, lengths)[number]
    return whole.reshape(spec.heads, 3, spec.head_width, *whole.shape[1:])[:, number].reshape(-1, *whole.shape[1:])
