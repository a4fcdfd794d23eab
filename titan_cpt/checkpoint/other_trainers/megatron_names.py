"""Where our weights are in Megatron-LM's GPTModel, and how the parts of tensor-parallel ranks become one tensor.

Names are those of its Transformer Engine layers, in which a norm belongs to the linear layer after it; the checkpoints
of its local layers are read under the same names. Sources: megatron/core/models/gpt, transformer/attention.py,
transformer/mlp.py of core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_cpt.models.llama.spec import LlamaSpec
from titan_cpt.models.spec import ModelSpec

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
BLOCKS = "decoder.layers."
_QKV, _FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"

LOCAL_NAMES = {
    "input_layernorm.weight": f"{_QKV}.layer_norm_weight",
    "input_layernorm.bias": f"{_QKV}.layer_norm_bias",
    "pre_mlp_layernorm.weight": f"{_FC1}.layer_norm_weight",
    "pre_mlp_layernorm.bias": f"{_FC1}.layer_norm_bias",
}
"""Names within a block of the local layers -> of the Transformer Engine layers, where they differ."""

_PROJECTIONS = tuple(f"self_attention.linear_proj.{kind}" for kind in ("weight", "bias"))
_QKV_NORM, _FC1_NORM = (tuple(f"{of}.layer_norm_{kind}" for kind in ("weight", "bias")) for of in (_QKV, _FC1))
_QKV_AND_QK_NORM = (
    *(f"{_QKV}.{kind}" for kind in ("weight", "bias")),
    *(f"self_attention.{part}_layernorm.weight" for part in "qk"),
)
_MLP = (*_FC1_NORM, *(f"mlp.{layer}.{kind}" for layer in ("linear_fc1", "linear_fc2") for kind in ("weight", "bias")))
LAYER_ORDERS = (
    (*_PROJECTIONS, *_QKV_NORM, *_QKV_AND_QK_NORM, *_MLP),
    (*_QKV_NORM, *_PROJECTIONS, *_QKV_AND_QK_NORM, *_MLP),
)
"""The parameters of a block in the order of the modules: of Transformer Engine layers, and of local layers."""

_ROWS = (f"{_QKV}.weight", f"{_QKV}.bias", f"{_FC1}.weight", f"{_FC1}.bias", EMBEDDING, HEAD)
_COLUMNS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


@dataclass(frozen=True)
class Source:
    """Where a weight is: a whole tensor of Megatron-LM, or a part of it.

    Attributes:
        name: the tensor's name.
        part: "q", "k", "v" of a fused QKV tensor; "gate", "up" of a fused SwiGLU tensor; "": the whole tensor.
    """

    name: str
    part: str = ""


def sources(spec: ModelSpec) -> dict[str, Source]:
    """Our name of every weight -> where it is in the whole model."""
    block = dict(_llama_block(spec) if isinstance(spec, LlamaSpec) else _gpt_neox_block())
    found = {"embedding.weight": Source(EMBEDDING)}
    for layer in range(spec.layers):
        for ours, source in block.items():
            found[f"blocks.{layer}.{ours}"] = Source(f"{BLOCKS}{layer}.{source.name}", source.part)
    for kind in ("weight",) if isinstance(spec, LlamaSpec) else ("weight", "bias"):
        found[f"final_norm.{kind}"] = Source(f"decoder.final_layernorm.{kind}")
    if not spec.tied:
        found["head.weight"] = Source(HEAD)
    return found


def _llama_block(spec: LlamaSpec) -> Iterator[tuple[str, Source]]:
    yield "attention_norm.weight", Source(f"{_QKV}.layer_norm_weight")
    yield "mlp_norm.weight", Source(f"{_FC1}.layer_norm_weight")
    for part in "qkv":
        for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
            yield f"attention.{part}.{kind}", Source(f"{_QKV}.{kind}", part)
    for part in "qk" if spec.qk_norm else "":
        yield f"attention.{part}_norm.weight", Source(f"self_attention.{part}_layernorm.weight")
    yield "attention.out.weight", Source("self_attention.linear_proj.weight")
    for part in ("gate", "up"):
        yield f"mlp.{part}.weight", Source(f"{_FC1}.weight", part)
    yield "mlp.down.weight", Source("mlp.linear_fc2.weight")


def _gpt_neox_block() -> Iterator[tuple[str, Source]]:
    for kind in ("weight", "bias"):
        yield f"attention_norm.{kind}", Source(f"{_QKV}.layer_norm_{kind}")
        yield f"attention.qkv.{kind}", Source(f"{_QKV}.{kind}")
        yield f"attention.out.{kind}", Source(f"self_attention.linear_proj.{kind}")
        yield f"mlp_norm.{kind}", Source(f"{_FC1}.layer_norm_{kind}")
        yield f"mlp.up.{kind}", Source(f"{_FC1}.{kind}")
        yield f"mlp.down.{kind}", Source(f"mlp.linear_fc2.{kind}")


def canonical(name: str) -> str:
    """The name in a Transformer Engine layer of a parameter of a local layer; other names as they are."""
    prefix, _, rest = name.removeprefix(BLOCKS).partition(".")
    if name.startswith(BLOCKS) and rest in LOCAL_NAMES:
        return f"{BLOCKS}{prefix}.{LOCAL_NAMES[rest]}"
    return name


def split_dim(name: str) -> int | None:
    """The dimension of a parameter that tensor parallelism splits; None: every rank has all of it."""
    if name.endswith(_ROWS):
        return 0
    return 1 if name.endswith(_COLUMNS) else None


def merge_ranks(name: str, parts: Sequence[Tensor], *, gated: bool) -> Tensor:
    """A parameter, or a moment of it, from the parts of all tensor-parallel ranks.

    Args:
        gated: the MLP is SwiGLU, of which each rank has a part of the gate above its part of the up projection.
    """
    dim = split_dim(name)
    if dim is None or len(parts) == 1:
        return parts[0]
    if gated and name.endswith((f"{_FC1}.weight", f"{_FC1}.bias")):
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(list(parts), dim)


def merged_shape(name: str, shape: Sequence[int], ranks: int) -> tuple[int, ...]:
    """The shape of `merge_ranks` of as many parts of this shape."""
    dim = split_dim(name)
    return tuple(length * (ranks if axis == dim else 1) for axis, length in enumerate(shape))


def part_shape(part: str, shape: tuple[int, ...], spec: ModelSpec) -> tuple[int, ...]:
    """The shape of a part of a whole tensor of this shape."""
    if part in ("gate", "up") and shape and shape[0] % 2 == 0:
        return (shape[0] // 2, *shape[1:])
    if part and isinstance(spec, LlamaSpec) and shape and shape[0] == spec.attention_width + 2 * spec.kv_width:
        shared = spec.heads // spec.kv_heads
        return (shape[0] // (shared + 2) * (shared if part == "q" else 1), *shape[1:])
    return shape


def take_part(part: str, whole: Tensor, spec: ModelSpec) -> Tensor:
    """A part of a whole tensor. QKV has, for each key/value head: its query heads, the key head, the value head."""
    if part in ("gate", "up"):
        return whole.chunk(2)[0 if part == "gate" else 1]
    if part and isinstance(spec, LlamaSpec):
        shared = spec.heads // spec.kv_heads
        groups = whole.reshape(spec.kv_heads, shared + 2, spec.head_width, *whole.shape[1:])
        chosen = {"q": slice(0, shared), "k": slice(shared, shared + 1), "v": slice(shared + 1, shared + 2)}[part]
        return groups[:, chosen].reshape(-1, *whole.shape[1:])
    return whole
