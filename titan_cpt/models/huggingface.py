"""Our names of a model's weights, and Hugging Face's: the mapping both ways. No weight is changed, copied or cast.

Hugging Face's names are those in the FILES, which all releases of transformers read and write. In memory transformers 5
gives some weights other names (the head of GPT-NeoX, `embed_out` in a file, is `lm_head` there).
"""

from collections.abc import Mapping

from torch import Tensor

from titan_cpt.errors import CheckpointError

_GPT_NEOX_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "attention.query_key_value",
    "attention.out": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
_GPT_NEOX_BUFFERS = (".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq")
"""Ends of the names of constants (causal mask, wavelengths) that older releases, Pythia's among them, saved as well."""


def gpt_neox_names(layers: int) -> dict[str, str]:
    """Our name of every weight of a GPT-NeoX with so many layers -> its name in a file of transformers'."""
    names = {"embedding.weight": "gpt_neox.embed_in.weight"}
    for layer in range(layers):
        for ours, theirs in _GPT_NEOX_BLOCK.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"gpt_neox.layers.{layer}.{theirs}.{kind}"
    for kind in ("weight", "bias"):
        names[f"final_norm.{kind}"] = f"gpt_neox.final_layer_norm.{kind}"
    names["head.weight"] = "embed_out.weight"
    return names


def gpt_neox_to_huggingface(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The state dict of our GPT-NeoX under the names of a file of transformers' GPTNeoXForCausalLM.

    Raises:
        CheckpointError: a weight is missing, or one is there that the model does not have.
    """
    return _renamed(state, gpt_neox_names(layers))


def gpt_neox_from_huggingface(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The weights of a file of transformers' GPTNeoXForCausalLM under our names; constants of older releases left out.

    Raises:
        CheckpointError: a weight is missing, or one is there that the model does not have.
    """
    weights = {name: tensor for name, tensor in state.items() if not name.endswith(_GPT_NEOX_BUFFERS)}
    return _renamed(weights, {theirs: ours for ours, theirs in gpt_neox_names(layers).items()})


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    faults = [f"  - {name}: missing" for name in names if name not in state]
    faults += [f"  - {name}: not a weight of this model" for name in state if name not in names]
    if faults:
        shown = faults[:10] + ([f"  - and {len(faults) - 10} more"] if len(faults) > 10 else [])
        raise CheckpointError("\n".join([f"the weights do not fit the model: {len(faults)} problems", *shown]))
    return {new: state[old] for old, new in names.items()}
