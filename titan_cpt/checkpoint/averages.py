"""The average in a checkpoint: whether it has one, and which checkpoints of its run do. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_cpt.checkpoint import manifest
from titan_cpt.common.recipe import differences
from titan_cpt.common.run_folder import checkpoint_folders
from titan_cpt.common.weights.averaging import KINDS
from titan_cpt.common.weights.named_weights import NamedWeights
from titan_cpt.errors import AccessError, CheckpointError

_ENTRY = "averaging"  # of the manifest: settings, and after which steps the snapshots were taken
_STEPS_SHOWN = 5


def has_average(record: Mapping[str, Any]) -> bool:
    """Whether the checkpoint with this manifest holds an average of its weights."""
    return bool(record.get(_ENTRY))


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
    """What the average in a checkpoint is made of, such as `mean of 10 snapshots, every 50 steps until step 1,000`."""
    entry = record.get(_ENTRY)
    known: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
    kind = KINDS.get(str(known.get("kind")), "average")
    shape = f" ({known['shape']})" if "shape" in known else ""
    steps = known.get("snapshots")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, int) for step in steps):
        return f"{kind}{shape} of its weights"
    count = known["count"] if known.get("kind") == "ema" and isinstance(known.get("count"), int) else len(steps)
    distance = f"every {steps[1] - steps[0]:,} steps until" if steps[1:] else "after"
    return f"{kind}{shape} of {count:,} snapshot{'s' * (count > 1)} of its weights, {distance} step {steps[-1]:,}"


def require_same_averaging(folder: Path, record: Mapping[str, Any], planned: Mapping[str, Any]) -> None:
    """Check that the average in a checkpoint was made with the settings of the plan.

    Args:
        record: the checkpoint's manifest, which has an average.
        planned: keys of the entry `averaging` in it.

    Raises:
        CheckpointError: it was made with other settings.
    """
    saved = record[_ENTRY] if isinstance(record[_ENTRY], Mapping) else {}
    changed = differences({key: saved[key] for key in planned if key in saved}, planned)
    if changed:
        raise CheckpointError(
            f"{folder}: its average was made with other settings than [averaging] has now: {'; '.join(changed)}. "
            "Restore them, or start the stage from the weights"
        )
