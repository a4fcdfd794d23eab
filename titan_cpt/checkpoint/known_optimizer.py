"""The optimizer that trained weights from another run, from their manifests. Does not import torch.

Where its state is kept, it must be the stage's own; a stage that trains such weights with another one has a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.tokenizer_check import CHECKPOINT_PREFIX
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.common.weights.named_weights import named_weights
from titan_cpt.errors import AccessError, CheckpointError, ConfigError
from titan_cpt.planning.plan import StagePlan
from titan_cpt.planning.stages.optimizers import OPTIMIZER_NAME, changed_optimizer, other_optimizer


def check_known_optimizers(stages: Sequence[StagePlan]) -> Iterator[str]:
    """Notes on stages whose initial weights, of a checkpoint on this machine, another optimizer has trained.

    Raises:
        ConfigError: such a stage keeps the optimizer state.
    """
    for stage in stages:
        found = _known_optimizer(stage.init) if isinstance(stage.init, str) else None
        if found is None or found == stage.optimizer.name:
            continue
        if stage.keep_optimizer:
            raise ConfigError(other_optimizer(stage, found, of=str(stage.init)))
        yield changed_optimizer(stage, found)


def _known_optimizer(init: str) -> str | None:
    """The optimizer of the stage that saved a checkpoint; None if it is not known, as for released models."""
    checkpoint = named_weights(Path(init.partition(":")[2])).folder
    if not init.startswith(CHECKPOINT_PREFIX) or not (checkpoint / MANIFEST_FILE).is_file():
        return None
    try:
        record = manifest.read(checkpoint)
    except (CheckpointError, AccessError):
        return None  # reported when the stage begins
    recipe, stage = record["recipe"], record["stage"]
    if f"stages.{stage}.optimizer_state" not in recipe:
        return None  # an import or a merge: no stage of a run
    return str(recipe.get(f"stages.{stage}.{OPTIMIZER_NAME}", "AdamW"))
