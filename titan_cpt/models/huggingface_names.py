"""Names of weights in Hugging Face's files, as far as families share them. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping

from titan_cpt.models.spec import ModelSpec


def weight_names_of(block: Mapping[str, str], spec: ModelSpec) -> dict[str, str]:
    """Our name of every weight -> its name in the files of a family that names all but its blocks as Llama does.

    Args:
        block: the same for the weights of one block, relative to it.
    """
    names = {"embedding.weight": "model.embed_tokens.weight"}
    for layer in range(spec.layers):
        names |= {f"blocks.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in block.items()}
    names["final_norm.weight"] = "model.norm.weight"
    if not spec.tied:
        names["head.weight"] = "lm_head.weight"
    return names
