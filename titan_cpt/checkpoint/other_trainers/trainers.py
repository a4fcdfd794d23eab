"""The trainers whose checkpoints can be imported, and their readers. Does not import torch until a reader is needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_cpt.checkpoint.other_trainers.trained_checkpoint import ImportRequest, TrainedCheckpoint

TRAINERS = ("torchtitan",)
"""Names of the trainers, as `titan-cpt import --from` takes them; each has a module of this name, with "_" for "-"."""


def reader_of(trainer: str) -> Callable[[ImportRequest], TrainedCheckpoint]:
    """The function `read` of a trainer's module: opens a checkpoint, and raises CheckpointError or ConfigError."""
    module = import_module(f"titan_cpt.checkpoint.other_trainers.{trainer.replace('-', '_')}")
    read: Callable[[ImportRequest], TrainedCheckpoint] = module.read
    return read
