"""What the two formats of Megatron-LM's checkpoints share: tensors under one set of names, merged from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from titan_cpt.checkpoint.other_trainers.megatron_names import merge_ranks, merged_shape


class Tensors(Protocol):
    """Weights, or one moment of all of them, of the whole model: Megatron-LM's name -> tensor."""

    def names(self) -> list[str]:
        """The names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the whole model."""

    def read(self, name: str) -> Tensor:
        """A tensor of the whole model."""

    def where(self, name: str) -> str:
        """A tensor's name in the files, for messages."""


@dataclass(frozen=True)
class RankPart:
    """The tensor of one rank: its name in the files, its shape, and how to read it."""

    where: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class MergedTensors:
    """Tensors whose parts the tensor-parallel ranks have.

    Attributes:
        parts: name -> the part of each rank.
        gated: the MLP is SwiGLU.
    """

    parts: Mapping[str, Sequence[RankPart]]
    gated: bool

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self.parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the whole model."""
        parts = self.parts[name]
        return merged_shape(name, parts[0].shape, len(parts))

    def read(self, name: str) -> Tensor:
        """A tensor of the whole model."""
        return merge_ranks(name, [part.read() for part in self.parts[name]], gated=self.gated)

    def where(self, name: str) -> str:
        """A tensor's name in the first rank's files."""
        return self.parts[name][0].where


def layers_of_chunks(layers: int, stages: int, chunks: int, first: int | None, last: int | None) -> list[list[range]]:
    """The layers of each pipeline stage's model chunks (virtual pipeline stages).

    Args:
        layers: of the whole model.
        stages: pipeline-parallel degree.
        chunks: of each stage.
        first: layers of the first stage if that differs from the others.
        last: layers of the last stage, likewise.

    Returns:
        For each stage, for each of its chunks, the layers.

    Raises:
        ValueError: the layers cannot be divided in this way.
    """
    others = stages - (first is not None) - (last is not None)
    middle = layers - (first or 0) - (last or 0)
    if others < 0 or (others and middle % others) or (not others and middle):
        raise ValueError(f"{layers} layers in {stages} stages")
    counts = [middle // others if others else 0] * stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    if any(count % chunks for count in counts):
        raise ValueError(f"{layers} layers in {stages} stages of {chunks} chunks")
    found: list[list[range]] = [[] for _ in range(stages)]
    start = 0
    for _ in range(chunks):
        for stage in range(stages):
            found[stage].append(range(start, start + counts[stage] // chunks))
            start += counts[stage] // chunks
    return found
