"""What a reader finds in a checkpoint of another trainer: the model, its weights and AdamW's state under our names.

A reader opens a checkpoint without reading its tensors: each one is read when it is written (`import_trained.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from titan_cpt.errors import CheckpointError
from titan_cpt.models.spec import ModelSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names of AdamW's first and second moment, which are ours too."""


@dataclass(frozen=True)
class ImportRequest:
    """What the user gives to a reader.

    Attributes:
        path: the checkpoint, a folder or a file.
        config: a file that describes the model, if the checkpoint does not; None: not given.
        weights_only: do not read the optimizer's state.
    """

    path: Path
    config: Path | None = None
    weights_only: bool = False


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the other trainer's files in our layout, which is not read yet.

    Attributes:
        where: its name in these files, for messages; of all names, if it is made of several tensors.
        shape: in our layout.
        read: reads it, in any floating-point dtype. It holds at most this tensor, or one that contains it, in memory.
    """

    where: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class AdamWState:
    """The state of AdamW for one weight.

    Attributes:
        exp_avg: mean of the gradients.
        exp_avg_sq: mean of their squares.
        step: number of updates that it counts, for the bias correction.
    """

    exp_avg: StoredTensor
    exp_avg_sq: StoredTensor
    step: int


@dataclass(frozen=True, kw_only=True)
class TrainedCheckpoint:
    """A checkpoint of another trainer.

    Attributes:
        trainer: its name, and version if that is known.
        spec: the model.
        weights: our name -> weight. The writer refuses a checkpoint that lacks one of the model's or has a wrong shape.
        optimizer: our name of a weight -> AdamW's state; empty: the checkpoint has none, or the
            request excludes it.
        foreign: names of tensors in the files that belong to no weight of the model, and are not known to be needless;
            the writer refuses them.
        step: optimizer steps that trained these weights; None: unknown.
        tokens: tokens that trained them; None: unknown.
        lr: learning rate of the last step; None: unknown.
        next_lr: learning rate that the trainer's own next step would have; None: unknown.
        settings: dotted key of our [optimizer] -> the other trainer's value, such as "optimizer.beta2": 0.95.
        seq_len: tokens of a sequence; None: unknown.
        not_imported: what the files hold beyond that, each with its name there.
        notes: what the user should know or check.
    """

    trainer: str
    spec: ModelSpec
    weights: Mapping[str, StoredTensor]
    optimizer: Mapping[str, AdamWState] = field(default_factory=dict)
    foreign: Sequence[str] = ()
    step: int | None = None
    tokens: int | None = None
    lr: float | None = None
    next_lr: float | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    seq_len: int | None = None
    not_imported: Sequence[str] = ()
    notes: Sequence[str] = ()


def require_layers(spec: ModelSpec, tensors: int, where: str) -> None:
    """Raise CheckpointError if a model has more layers than a checkpoint has tensors, before each layer is looked up.

    Args:
        tensors: number of tensors in the checkpoint.
        where: the checkpoint, for the message.
    """
    if spec.layers > tensors:
        raise CheckpointError(
            f"{where}: has {tensors:,} tensors, but a model of {spec.layers:,} layers is described: correct the config"
        )
