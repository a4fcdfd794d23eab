"""Paths of evaluation: the folder of a checkpoint's scores, and the stage-end checkpoints of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
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
from titan_cpt.errors import CheckpointError


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None outside of runs, as for an imported model."""
    run = checkpoint.absolute().parent.parent
    return run if is_there(run / CONFIG_FILE) else None


def scores_folder(checkpoint: Path, record: Mapping[str, Any]) -> Path:
    """The folder of a checkpoint's scores: in its run's folder, or beside a checkpoint outside of runs."""
    run = run_of(checkpoint)
    if run is None:
        return checkpoint.absolute().with_name(f"{checkpoint.absolute().name}-{EVALUATIONS_FOLDER}")
    return run / EVALUATIONS_FOLDER / str(record["stage"]) / step_name(record["steps_done"])


def stage_ends(path: Path) -> list[Path]:
    """The checkpoints that a path stands for: a checkpoint itself, or the checkpoints at a run's stage ends, in order.

    Raises:
        CheckpointError: the folder is neither, or the run has not completed a stage.
    """
    if is_there(path / MANIFEST_FILE) or not is_there(path / PLAN_FILE):
        manifest.read(path)
        return [path]
    found = [(manifest.read(folder), folder) for folder in checkpoint_folders(path)]
    ends = sorted(
        (record["run_step"], folder)
        for record, folder in found
        if record["kind"] == STAGE_END and manifest.is_in_place(folder, record)
    )
    if not ends:
        raise CheckpointError(f"{path}: no stage of this run is complete; give one of its checkpoints")
    return [folder for _, folder in ends]
