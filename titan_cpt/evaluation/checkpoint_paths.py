"""Paths of evaluation: the folder of a checkpoint's scores, and the stage-end checkpoints of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.averages import has_average, require_weights
from titan_cpt.common.reading import is_there
from titan_cpt.common.run_folder import (
    CONFIG_FILE,
    EVALUATIONS_FOLDER,
    MANIFEST_FILE,
    PLAN_FILE,
    STAGE_END,
    checkpoint_folders,
    step_name,
)
from titan_cpt.common.weights.named_weights import NamedWeights, named_weights, suffix_of
from titan_cpt.errors import CheckpointError


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None outside of runs, as for an imported model."""
    run = checkpoint.absolute().parent.parent
    return run if is_there(run / CONFIG_FILE) else None


def scores_folder(weights: NamedWeights, record: Mapping[str, Any]) -> Path:
    """The folder of a checkpoint's scores: in its run's folder, or beside a checkpoint outside of runs.

    Its average has a folder of its own, whose name ends in @average.
    """
    suffix = suffix_of(weights.average)
    run = run_of(weights.folder)
    if run is None:
        checkpoint = weights.folder.absolute()
        return checkpoint.with_name(f"{checkpoint.name}{suffix}-{EVALUATIONS_FOLDER}")
    return run / EVALUATIONS_FOLDER / str(record["stage"]) / f"{step_name(record['steps_done'])}{suffix}"


def stage_ends(name: Path) -> list[NamedWeights]:
    """The weights that a path stands for: those of a checkpoint, or of the checkpoints at a run's stage ends, in order.

    `PATH@average` stands for their averages. A run's stage ends that hold none are skipped.

    Raises:
        CheckpointError: the folder is neither, the run has not completed a stage, or there is no average.
    """
    named = named_weights(name)
    path = named.folder
    if is_there(path / MANIFEST_FILE) or not is_there(path / PLAN_FILE):
        require_weights(named, manifest.read(path))
        return [named]
    found = [(manifest.read(folder), folder) for folder in checkpoint_folders(path)]
    ends = sorted(
        (record["run_step"], folder, has_average(record))
        for record, folder in found
        if record["kind"] == STAGE_END and manifest.is_in_place(folder, record)
    )
    if not ends:
        raise CheckpointError(f"{path}: no stage of this run is complete; give one of its checkpoints")
    wanted = [folder for _, folder, averaged in ends if averaged or not named.average]
    if not wanted:
        require_weights(NamedWeights(ends[-1][1], average=True), manifest.read(ends[-1][1]))
    return [NamedWeights(folder, named.average) for folder in wanted]
