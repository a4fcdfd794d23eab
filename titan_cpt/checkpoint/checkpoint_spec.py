"""The model of a checkpoint's weights: the recipe's [model], with the RoPE that the checkpoint's stage trained with.

A manifest has the field `rope` only if that RoPE is not the one of [model].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_cpt.common.recipe import differences
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.errors import CheckpointError, ConfigError
from titan_cpt.models.registry import spec_from_recipe
from titan_cpt.models.spec import ModelSpec, Rope, RopeScaling

ROPE_KEYS = ("model.rope_base", "model.rope_scaling")
"""The keys of a recipe that a stage's `rope` replaces."""
_ROWS = "model.vocab_size"


def model_recipe(record: Mapping[str, Any]) -> dict[str, Any]:
    """The `model.*` keys of a manifest's recipe, with the RoPE of the checkpoint's weights."""
    rope = record.get("rope")
    own = {f"model.{name}": value for name, value in rope.items()} if isinstance(rope, Mapping) else {}
    recipe = {key: value for key, value in record["recipe"].items() if key.startswith(("model.", "plugins.model."))}
    return recipe | {key: own[key] for key in ROPE_KEYS if key in own}


def rope_of_checkpoint(record: Mapping[str, Any]) -> Rope:
    """The RoPE of a checkpoint's weights, from its manifest."""
    recipe = model_recipe(record)
    scaling = recipe.get("model.rope_scaling")
    base = float(recipe.get("model.rope_base", ModelSpec.rope_base))
    return Rope(base, RopeScaling(**scaling) if isinstance(scaling, Mapping) else None)


def spec_of_checkpoint(record: Mapping[str, Any], folder: Path) -> ModelSpec:
    """The model of a checkpoint's weights.

    Args:
        record: its manifest.
        folder: the checkpoint, for messages.

    Raises:
        CheckpointError: the manifest does not describe a model of a known family.
    """
    try:
        return spec_from_recipe(model_recipe(record))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST_FILE}: {error}") from None


def model_differences(
    recorded: Mapping[str, Any], planned: Mapping[str, Any], new_rope: Collection[str] = ()
) -> list[str]:
    """The differences of two recipes in the model's settings; an absent setting counts as null.

    Args:
        new_rope: those of `ROPE_KEYS` that may differ, because the stage sets them.
    """
    keys = {key for key in {*recorded, *planned} if key.startswith("model.") and key not in new_rope}
    return differences({key: recorded.get(key) for key in keys}, {key: planned.get(key) for key in keys})


def rope_change(old: Rope, new: Rope) -> str | None:
    """A message for the log if a stage changes the RoPE of its initial weights."""
    return None if old == new else f"RoPE: {old} -> {new}"


def remedies_of(changed: Sequence[str]) -> Iterator[str]:
    """What to do if a checkpoint and the config differ in RoPE or in the rows of the vocabulary; nothing otherwise."""
    if any(line.startswith(ROPE_KEYS) for line in changed):
        yield (
            "RoPE belongs to the weights: set it in [model] as they have it, or let the stage change it (context "
            "extension): rope = { base = ... } in its [[stages]], with kind if the scaling changes too"
        )
    if any(line.startswith(_ROWS) for line in changed):
        yield (
            f"the rows of the vocabulary belong to the weights: set {_ROWS} as they have it; if your tokenizer extends "
            "theirs, name theirs in [tokenizer] extend = { base = ... }"
        )
