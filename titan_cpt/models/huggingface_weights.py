"""Weight names of our models and of Hugging Face's files, mapped both ways. No weight is changed, copied or cast.

The names are those in the FILES, which all versions of transformers read and write. In memory, transformers 5 has other
names for some weights (the head of GPT-NeoX, `embed_out` in a file, is `lm_head` there).
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from titan_cpt.common.text import problem_list
from titan_cpt.errors import CheckpointError
from titan_cpt.models.registry import family_module
from titan_cpt.models.spec import ModelSpec

VOCABULARY_WEIGHTS = ("embedding.weight", "head.weight")
"""Our names of the weights that have one row per token id."""

_CONSTANTS = re.compile(
    r"(^|\.)((attention|attn|self_attn)\.(bias|masked_bias)"  # causal masks
    r"|(rotary_emb|rotary_pos_emb|rope)\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached"  # wavelengths
    r"|position_ids)$"
)
"""Matches the names of buffers that some releases saved beside the weights: Pythia's causal masks, a Llama's rotary_emb
of each layer (transformers before 4.31), and that of the whole model (4.43 and later) in a state dict."""


def hub_names(spec: ModelSpec) -> dict[str, str]:
    """Our name of every weight of a model -> its name in Hugging Face's files.

    Raises:
        ConfigError: the spec's family is unknown.
    """
    names: dict[str, str] = family_module(spec.family, "huggingface").weight_names(spec)
    return names


def foreign_and_missing(names: Iterable[str], spec: ModelSpec) -> tuple[list[str], list[str]]:
    """Names in Hugging Face's files that are not weights of the model, and weights of the model that the files lack.

    Buffers of older releases do not count, nor does the head that some files of tied models repeat.
    """
    known = set(hub_names(spec).values())
    found = {name for name in names if not is_constant(name)}
    if spec.tied:
        found.discard("lm_head.weight")
    return sorted(found - known), sorted(known - found)


def is_constant(name: str) -> bool:
    """Whether a name in a file is that of a constant buffer, which is recomputed and never read."""
    return _CONSTANTS.search(name) is not None


def to_huggingface(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Our model's state dict under the names of Hugging Face's files.

    Raises:
        CheckpointError: a weight is missing, or the model does not have it.
    """
    names = hub_names(spec)
    _refuse(sorted(set(state) - set(names)), sorted(set(names) - set(state)))
    return {theirs: state[ours] for ours, theirs in names.items()}


def from_huggingface(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The weights of Hugging Face's files under our names, without the constant buffers of older releases.

    Raises:
        CheckpointError: a weight is missing, or the model does not have it.
    """
    _refuse(*foreign_and_missing(state, spec))
    return {ours: state[theirs] for ours, theirs in hub_names(spec).items()}


def _refuse(foreign: list[str], missing: list[str]) -> None:
    faults = [f"{name}: missing" for name in missing] + [f"{name}: not a weight of this model" for name in foreign]
    if faults:
        raise CheckpointError("the weights do not fit the model: " + problem_list(faults))
