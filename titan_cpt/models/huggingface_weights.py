"""Our names of a model's weights, and Hugging Face's: the mapping both ways. No weight is changed, copied or cast.

Hugging Face's names are those in the FILES, which all releases of transformers read and write. In memory transformers 5
gives some weights other names (the head of GPT-NeoX, `embed_out` in a file, is `lm_head` there).
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from titan_cpt.errors import CheckpointError
from titan_cpt.models.spec import GPTNeoXSpec, LlamaSpec, ModelSpec

VOCABULARY_WEIGHTS = ("embedding.weight", "head.weight")
"""Our names of the weights with a row for each id."""

_GPT_NEOX_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "attention.query_key_value",
    "attention.out": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_LLAMA_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_QKV_BIAS = {f"attention.{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}
_QK_NORM = {f"attention.{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}
_CONSTANTS = re.compile(
    r"(^|\.)((attention|attn|self_attn)\.(bias|masked_bias)"  # causal masks
    r"|(rotary_emb|rotary_pos_emb|rope)\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached"  # wavelengths
    r"|position_ids)$"
)
"""Ends of the names of constants that are no weights, which releases saved as well: Pythia's among them, a Llama's
rotary_emb of each layer (transformers before 4.31) and the one of the whole model (4.43 on) in a state dict."""


def hub_names(spec: ModelSpec) -> dict[str, str]:
    """Our name of every weight of such a model -> its name in a file of transformers'.

    Raises:
        CheckpointError: the family has no counterpart in transformers.
    """
    if isinstance(spec, GPTNeoXSpec):
        return _gpt_neox_names(spec)
    if isinstance(spec, LlamaSpec):
        return _llama_names(spec)
    raise CheckpointError(
        f"weights of the family {spec.family!r} have no names of Hugging Face's yet, so that they can be neither "
        "imported nor exported: hub_names in models/huggingface.py would map them"
    )


def _gpt_neox_names(spec: GPTNeoXSpec) -> dict[str, str]:
    names = {"embedding.weight": "gpt_neox.embed_in.weight"}
    for layer in range(spec.layers):
        for ours, theirs in _GPT_NEOX_BLOCK.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"gpt_neox.layers.{layer}.{theirs}.{kind}"
    for kind in ("weight", "bias"):
        names[f"final_norm.{kind}"] = f"gpt_neox.final_layer_norm.{kind}"
    names["head.weight"] = "embed_out.weight"
    return names


def _llama_names(spec: LlamaSpec) -> dict[str, str]:
    block = _LLAMA_BLOCK | (_QKV_BIAS if spec.qkv_bias else {}) | (_QK_NORM if spec.qk_norm else {})
    names = {"embedding.weight": "model.embed_tokens.weight"}
    for layer in range(spec.layers):
        names |= {f"blocks.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in block.items()}
    names["final_norm.weight"] = "model.norm.weight"
    if not spec.tie_embeddings:
        names["head.weight"] = "lm_head.weight"
    return names


def foreign_and_missing(names: Iterable[str], spec: ModelSpec) -> tuple[list[str], list[str]]:
    """Names in a file of transformers' that are no weight of such a model, and the model's that the file lacks.

    Constants of older releases are no weights; nor is the head that some files of tied models repeat.
    """
    known = set(hub_names(spec).values())
    found = {name for name in names if not is_constant(name)}
    if spec.tied:
        found.discard("lm_head.weight")
    return sorted(found - known), sorted(known - found)


def is_constant(name: str) -> bool:
    """Whether a name in a file is that of a constant, which is worked out anew and never read."""
    return _CONSTANTS.search(name) is not None


def to_huggingface(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The state dict of our model under the names of a file of transformers'.

    Raises:
        CheckpointError: a weight is missing, or one is there that the model does not have.
    """
    names = hub_names(spec)
    _refuse(sorted(set(state) - set(names)), sorted(set(names) - set(state)))
    return {theirs: state[ours] for ours, theirs in names.items()}


def from_huggingface(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The weights of a file of transformers' under our names; constants of older releases left out.

    Raises:
        CheckpointError: a weight is missing, or one is there that the model does not have.
    """
    _refuse(*foreign_and_missing(state, spec))
    return {ours: state[theirs] for ours, theirs in hub_names(spec).items()}


def _refuse(foreign: list[str], missing: list[str]) -> None:
    faults = [f"{name}: missing" for name in missing] + [f"{name}: not a weight of this model" for name in foreign]
    if faults:
        raise CheckpointError("the weights do not fit the model: " + in_lines(faults))


def in_lines(faults: list[str]) -> str:
    """The number of faults, and up to ten of them, a line each."""
    shown = faults[:10] + ([f"and {len(faults) - 10} more"] if len(faults) > 10 else [])
    count = "1 problem" if len(faults) == 1 else f"{len(faults)} problems"
    return "\n  - ".join([count, *shown])
