"""Remove local checkpoints whose upload has been verified, beyond checkpoint.upload.keep_local."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.manager import FoundCheckpoint


def prune_uploaded(
    listed: Sequence[FoundCheckpoint],
    keep: int,
    *,
    is_uploaded: Callable[[Path], bool],
    needed: Collection[Path],
) -> list[Path]:
    """Remove all checkpoints except the newest `keep`, those not uploaded yet, and those needed; returns the removed.

    Args:
        listed: all checkpoints of the run, newest first.
        keep: 1 or more, so that the one to resume from stays.
        is_uploaded: whether the upload of a folder has been verified.
        needed: folders that a stage still starts from.

    Raises:
        OSError: a checkpoint cannot be removed; its manifest is removed first, so it is never half a checkpoint.
    """
    removed = []
    for found in listed[max(1, keep) :]:
        if found.folder not in needed and is_uploaded(found.folder):
            manifest.remove(found.folder)
            removed.append(found.folder)
    return removed
