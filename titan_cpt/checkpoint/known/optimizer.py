"""The optimizer that trained weights from another run, from their manifests. Does not import torch.

Where its state is kept, it must be the stage's own; a stage that trains such weights with another one has a note, and
one that trains other weights or rows, whose state begins anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.tokenizer_check import CHECKPOINT_PREFIX
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.common.weights.named_weights import named_weights
from titan_cpt.common.weights.partition import partition_of_recipe
from titan_cpt.errors import AccessError, CheckpointError, ConfigError
from titan_cpt.planning.plan import StagePlan
from titan_cpt.planning.stages.optimizers import OPTIMIZER_NAME, changed_optimizer, other_optimizer
from titan_cpt.planning.stages.partition import new_state_note, weight_sizes


def check_known_optimizers(stages: Sequence[StagePlan]) -> Iterator[str]:
    """Notes on stages whose initial weights, of a checkpoint on this machine, were trained in another way.

    That is: with another optimizer; or, if the optimizer state is kept, in other rows.

    Raises:
        ConfigError: such a stage keeps the optimizer state, or the weights have none.
    """
    for stage in stages:
        record = _known_record(stage.init) if isinstance(stage.init, str) else None
        if record is None:
            continue
        if stage.keep_optimizer and not manifest.has_optimizer_state(record):
            raise ConfigError(manifest.no_state_to_keep(record, of=str(stage.init), stage=stage.name))
        recipe, before = record["recipe"], record["stage"]
        if f"stages.{before}.optimizer_state" not in recipe and manifest.imported_optimizer(record) is None:
            continue  # a released model or a merge: no stage of a run
        found = str(recipe.get(f"stages.{before}.{OPTIMIZER_NAME}", "AdamW"))
        if found != stage.optimizer.name:
            if stage.keep_optimizer:
                raise ConfigError(other_optimizer(stage, found, of=str(stage.init)))
            yield changed_optimizer(stage, found)
        elif stage.keep_optimizer:
            sizes = weight_sizes(stage.spec)
            note = new_state_note(stage, partition_of_recipe(recipe, before, sizes), of=str(stage.init))
            if note is not None:
                yield note


def _known_record(init: str) -> dict[str, Any] | None:
    """The manifest of a checkpoint on this machine; None if it is not there."""
    checkpoint = named_weights(Path(init.partition(":")[2])).folder
    if not init.startswith(CHECKPOINT_PREFIX) or not (checkpoint / MANIFEST_FILE).is_file():
        return None
    try:
        return manifest.read(checkpoint)
    except (CheckpointError, AccessError):
        return None  # reported when the stage begins
