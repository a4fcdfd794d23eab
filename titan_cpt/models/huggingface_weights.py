"""Rename weights from our names to those in Hugging Face's files and back, without changing, copying or casting them.

All versions of transformers read and write the same names in files. In memory, transformers 5 names some weights
differently (GPT-NeoX's head is `embed_out` in files and `lm_head` in memory).
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from titan_cpt.common.text import problem_list
from titan_cpt.errors import CheckpointError
from titan_cpt.models.registry import family_module
from titan_cpt.models.spec import ModelSpec

VOCABULARY_WEIGHTS = ("embedding.weight", "head.weight")
"""Our names of the weights with one row per token id."""

_CONSTANTS = re.compile(
    r"(^|\.)((attention|attn|self_attn)\.(bias|masked_bias)"  # causal masks
    r"|(rotary_emb|rotary_pos_emb|rope)\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached"  # wavelengths
    r"|position_ids)$"
)
"""Matches the names of buffers that some releases saved with the weights: Pythia's causal masks, and Llama's
rotary_emb, per layer (transformers before 4.31) or once in a state dict of the whole model (4.43 and later)."""


def hub_names(spec: ModelSpec) -> dict[str, str]:
    """Our name of every weight of a model -> its name in Hugging Face's files.

    Raises:
        ConfigError: the spec's family is unknown.
    """
    names: dict[str, str] = family_module(spec.family, "huggingface").weight_names(spec)
    return names


def foreign_and_missing(names: Iterable[str], spec: ModelSpec) -> tuple[list[str], list[str]]:
    """Names in Hugging Face's files that are not weights of the model, and the model's weights missing from the files.

    Ignores constant buffers, and the copy of the embedding that some files of tied models save as the head.
    """
    known = set(hub_names(spec).values())
    found = {name for name in names if not is_constant(name)}
    if spec.tied:
        found.discard("lm_head.weight")
    return sorted(found - known), sorted(known - found)


def is_constant(name: str) -> bool:
    """Whether a name in a file is that of a constant buffer, which we compute instead of loading it."""
    return _CONSTANTS.search(name) is not None


def to_huggingface(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Rename our model's state dict to the names in Hugging Face's files.

    Raises:
        CheckpointError: the state dict lacks a weight of the model, or has one that the model does not have.
    """
    names = hub_names(spec)
    _refuse(sorted(set(state) - set(names)), sorted(set(names) - set(state)))
    return {theirs: state[ours] for ours, theirs in names.items()}


def from_huggingface(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Rename the weights of Hugging Face's files to our names, and drop the constant buffers of older releases.

    Raises:
        CheckpointError: the files lack a weight of the model, or have one that the model does not have.
    """
    _refuse(*foreign_and_missing(state, spec))
    return {ours: state[theirs] for ours, theirs in hub_names(spec).items()}


def _refuse(foreign: list[str], missing: list[str]) -> None:
    faults = [f"{name}: missing" for name in missing] + [f"{name}: not a weight of this model" for name in foreign]
    if faults:
        raise CheckpointError("the weights do not fit the model: " + problem_list(faults))
