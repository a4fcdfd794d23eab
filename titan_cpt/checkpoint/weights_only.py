"""Checkpoints that no stage of a run saved, written one tensor after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from titan_cpt.checkpoint.hf_release import weight_shapes
from titan_cpt.checkpoint.storage import ShardWriter, without_dist_warning
from titan_cpt.common.recipe import fingerprint
from titan_cpt.models.spec import ModelSpec


def record_without_training(kind: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of such a checkpoint, without its files and without what is known of its weights.

    Args:
        kind: how the weights were made; also in place of a stage's name.
        recipe: the model, and what is known of the weights' training.
    """
    return {
        "stage": kind,
        "stage_index": 0,
        "steps_done": 0,
        "run_step": 0,
        "kind": kind,
        "recipe": dict(recipe),
        "fingerprint": fingerprint(recipe),
        "data": {},
        "torch": torch.__version__,
    }


def save_weights(spec: ModelSpec, read: Callable[[str], Tensor], folder: Path) -> dict[str, dict[str, Any]]:
    """Write all weights of a model, in float32, one after another; returns the checksums for `manifest.write`.

    Args:
        read: gives a weight by its name, when it is written.
        folder: exists and is empty.
    """
    shapes = {f"model.{name}": lengths for name, lengths in weight_shapes(spec).items()}
    return save_tensors(shapes, lambda name: read(name.removeprefix("model.")), folder)


def save_tensors(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], folder: Path
) -> dict[str, dict[str, Any]]:
    """Write tensors in float32, one after another; returns the checksums for `manifest.write`.

    Args:
        shapes: name in the checkpoint, such as `model.<weight>` or `optimizer.state.<weight>.exp_avg` -> shape.
        read: gives a tensor by this name, when it is written.
        folder: exists and is empty.
    """
    state: dict[str, Any] = {
        name: torch.empty(lengths, dtype=torch.float32, device="meta") for name, lengths in shapes.items()
    }
    writer = ShardWriter(folder, threads=1)
    with without_dist_warning():
        save(state, storage_writer=writer, planner=LazySavePlanner(lambda name: read(name).float()), no_dist=True)
    return writer.checksums


class LazySavePlanner(DefaultSavePlanner):
    """A DCP save planner for tensors on the meta device: it reads each tensor when the writer needs it.

    Args:
        read: gives a tensor, of the dtype of its stand-in, by its name in the checkpoint.
    """

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Read the tensor."""
        return self._read(index.fqn)
