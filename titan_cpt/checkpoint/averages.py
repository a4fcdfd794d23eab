"""The average in a checkpoint: whether it has one, and which checkpoints of its run do. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.common.run_folder import checkpoint_folders
from titan_cpt.common.weights.named_weights import NamedWeights
from titan_cpt.errors import AccessError, CheckpointError

_STEPS_SHOWN = 5


def has_average(record: Mapping[str, Any]) -> bool:
    """Whether the checkpoint with this manifest holds an average of its weights."""
    return bool(record.get("averaging"))


def require_weights(weights: NamedWeights, record: Mapping[str, Any]) -> None:
    """Check that a checkpoint holds the named weights.

    Args:
        record: its manifest.

    Raises:
        CheckpointError: the average is requested, and there is none; the message lists the checkpoints with one.
    """
    if weights.average and not has_average(record):
        raise CheckpointError(f"{weights.folder}: holds no average of its weights; {_with_average(weights.folder)}")


def _with_average(folder: Path) -> str:
    """Which checkpoints of the run of a checkpoint hold an average."""
    steps: dict[str, list[int]] = {}
    for other in _checkpoints_beside(folder):
        try:
            record = manifest.read(other)
        except (CheckpointError, AccessError):
            continue
        if has_average(record):
            steps.setdefault(str(record["stage"]), []).append(int(record["steps_done"]))
    if not steps:
        return "nor does any checkpoint beside it: a run keeps averages if its config has a table [averaging]"
    found = [f"{stage} at step {_shown(sorted(done))}" for stage, done in sorted(steps.items())]
    return f"checkpoints of its run with an average: {'; '.join(found)}"


def _checkpoints_beside(folder: Path) -> list[Path]:
    try:
        return checkpoint_folders(folder.absolute().parent.parent)
    except AccessError:
        return []


def _shown(steps: list[int]) -> str:
    return ("..., " if steps[_STEPS_SHOWN:] else "") + ", ".join(f"{step:,}" for step in steps[-_STEPS_SHOWN:])


def describe_average(record: Mapping[str, Any]) -> str:
    """The kind of the average in a checkpoint and the steps of its snapshots, from the manifest."""
    return "an average of the weights"
