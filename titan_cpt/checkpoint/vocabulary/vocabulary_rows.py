"""Rows of the weights with one row per token id, read in blocks from the files of a release or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from titan_cpt.checkpoint.hf_release import ReleasedModel
from titan_cpt.checkpoint.merge.stored_weights import StoredWeights
from titan_cpt.common.weights.named_weights import AVERAGE, MODEL
from titan_cpt.models.huggingface_weights import VOCABULARY_WEIGHTS
from titan_cpt.models.spec import ModelSpec

_BLOCK_VALUES = 1 << 22  # 32 MiB in float64


@dataclass(frozen=True)
class VocabularyRows:
    """The embedding, and the head unless it is tied, in the files of some weights.

    Attributes:
        spec: the model in the files.
        read: gives rows of a weight by its name, in the dtype of the files.
        count: rows that are read: all, or as many as the model has that they are loaded into.
    """

    spec: ModelSpec
    read: Callable[[str, slice], Tensor]
    count: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the weights: embedding.weight, and head.weight unless it is tied."""
        return VOCABULARY_WEIGHTS[:1] if self.spec.tied else VOCABULARY_WEIGHTS

    def blocks(self, name: str, wanted: NDArray[np.bool_] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """All rows of a weight in order, as blocks in the dtype of the files.

        Args:
            wanted: skip the blocks without any of these rows; None for all blocks.
        """
        size = max(1, _BLOCK_VALUES // self.spec.width)
        for first in range(0, self.count, size):
            rows = slice(first, min(first + size, self.count))
            if wanted is None or wanted[rows].any():
                yield rows, self.read(name, rows)

    def mean(self, name: str, included: NDArray[np.bool_]) -> Tensor:
        """The mean of some rows, float32 [width]; summed in float64, one row after another.

        The result depends neither on the size of blocks nor on the number of threads.
        """
        total = np.zeros(self.spec.width)
        for rows, block in self.blocks(name, included):
            chosen = block.double().numpy()[included[rows]]
            total = np.add.reduce(np.concatenate((total[None], chosen)), axis=0)
        return torch.from_numpy(total / included.sum()).float()


def released_rows(released: ReleasedModel, rows: int) -> VocabularyRows:
    """The rows of a Hugging Face model that a model with `rows` rows takes."""
    return VocabularyRows(released.spec, released.read_file_rows, min(rows, released.spec.vocab_size))


def stored_rows(folder: Path, spec: ModelSpec, *, average: bool = False) -> VocabularyRows:
    """The rows of a verified checkpoint, or of the average in it.

    Raises:
        CheckpointError: the checkpoint's index is damaged, or does not fit the model.
    """
    return VocabularyRows(spec, StoredWeights(folder, spec, AVERAGE if average else MODEL).read, spec.vocab_size)
