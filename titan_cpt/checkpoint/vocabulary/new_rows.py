"""Rows of the embedding and the output layer for the ids that an extended tokenizer adds, from the rows of old ids.

Each rank computes the rows of its own shard from the files of the initial weights, without communication. Sums are in
float64, in the order of the ids, so that the rows are the same bits under every layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from titan_cpt.checkpoint import manifest
from titan_cpt.checkpoint.checkpoint_spec import spec_of_checkpoint
from titan_cpt.checkpoint.state_dict import master_weights
from titan_cpt.checkpoint.vocabulary.model_rows import NewValues
from titan_cpt.checkpoint.vocabulary.vocabulary_rows import stored_rows
from titan_cpt.common.weights.named_weights import NamedWeights
from titan_cpt.common.weights.new_rows import NewRowsKind, describe_new_rows
from titan_cpt.distributed.float8 import local_values
from titan_cpt.distributed.weight_rows import local_slices
from titan_cpt.errors import CheckpointError
from titan_cpt.models.huggingface_weights import VOCABULARY_WEIGHTS

BLOCK_ROWS = 8192  # old rows read, and new rows computed, at a time

ReadRows: TypeAlias = Callable[[str, slice], Tensor]
"""Reads rows of a vocabulary weight, by our name, in the dtype of the source's files."""


@dataclass(frozen=True)
class NewRows:
    """How rows of new ids are computed.

    Attributes:
        kind: mean of the rows of an id's pieces; mean of all old rows; samples of a normal distribution with the mean
            and the (population) standard deviation of the old rows in each column.
        first: the first new id: ids below are those of the extended tokenizer's base, whose rows are the old ones.
        end: number of ids of the extended tokenizer. Rows from here on are padding: the mean of the old rows.
        seed: of the samples.
        pieces: the old ids that stand for the text of each new id, for the kind "pieces". A new id without any gets
            the mean of the old rows.
    """

    kind: NewRowsKind
    first: int
    end: int
    seed: int
    pieces: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def describe(self, rows: int, *, tied: bool) -> str:
        """The new rows in words, for the log.

        Args:
            rows: of the model's vocabulary weights.
            tied: the embedding is the output layer too.
        """
        new = self.end - self.first
        without = new - sum(map(bool, self.pieces.values())) if self.kind == "pieces" else 0
        return describe_new_rows(self.kind, new, without_pieces=without, padding=rows - self.end, tied=tied)


def require_old_rows(source: str, rows: int, new: NewRows) -> None:
    """Check that weights have a row for every old id.

    Args:
        source: of the weights, for the message.
        rows: of its vocabulary weights.

    Raises:
        CheckpointError: they have not.
    """
    if rows < new.first:
        raise CheckpointError(
            f"{source}: has {rows:,} vocabulary rows, fewer than the {new.first:,} ids of tokenizer.extend.base: "
            "name the tokenizer that these weights were trained with"
        )


def read_checkpoint(weights: NamedWeights) -> ReadRows:
    """Reads rows of the weights of a verified checkpoint.

    Raises:
        CheckpointError: it is damaged.
    """
    spec = spec_of_checkpoint(manifest.read(weights.folder), weights.folder)
    return stored_rows(weights.folder, spec, average=weights.average).read


@torch.no_grad()
def load_vocabulary(
    model: nn.Module, read: ReadRows, new: NewRows, changes: Mapping[str, NewValues] | None = None
) -> None:
    """Write this rank's shard of the embedding and the output layer: old rows as they are, new ones computed.

    Args:
        model: sharded or not; its rows below `new.first` exist in the source.
        read: reads rows of the source.
        new: how the other rows are computed.
        changes: values that replace old rows of the source, also where new rows are computed from them.

    Raises:
        CheckpointError: a file can no longer be read.
    """
    weights = master_weights(model)
    for name in VOCABULARY_WEIGHTS:
        if name not in weights:
            continue  # tied, or on another pipeline stage
        rows, columns = local_slices(weights[name])
        local = local_values(weights[name])
        old_rows = partial(_read_changed, read, name, (changes or {}).get(name))
        computed = ComputedRows(old_rows, new, name)
        for first in range(rows.start, rows.stop, BLOCK_ROWS):
            end = min(first + BLOCK_ROWS, rows.stop)
            old_end = min(max(first, new.first), end)
            if first < old_end:
                local[first - rows.start : old_end - rows.start].copy_(old_rows(slice(first, old_end))[:, columns])
            if old_end < end:
                values = computed.rows(old_end, end)[:, columns]
                local[old_end - rows.start : end - rows.start].copy_(values.to(local.dtype))


def _read_changed(read: ReadRows, name: str, changes: NewValues | None, rows: slice) -> Tensor:
    """Rows of a weight, float32 where some are replaced."""
    found = read(name, rows)
    if changes is None:
        return found
    here = (changes.ids >= rows.start) & (changes.ids < rows.stop)
    found = found.float().clone()
    found[changes.ids[here] - rows.start] = changes.values.expand(len(changes.ids), -1)[here]
    return found


class ComputedRows:
    """Rows of new ids of one vocabulary weight, in float64, with all their columns.

    Args:
        read: reads old rows.
        new: how new rows are computed.
        name: of the weight; samples depend on it.
    """

    def __init__(self, read: Callable[[slice], Tensor], new: NewRows, name: str) -> None:
        self._read = read
        self._new = new
        self._name = name
        self._moments: tuple[Tensor, Tensor] | None = None

    def rows(self, first: int, end: int) -> Tensor:
        """Rows [first, end), of which none is old."""
        new = self._new
        last_new = min(max(first, new.end), end)
        parts = []
        if first < last_new:
            compute = {"pieces": self._of_pieces, "mean": self._means, "normal": self._samples}[new.kind]
            parts.append(compute(first, last_new))
        if last_new < end:
            parts.append(self._means(last_new, end))
        return torch.cat(parts)

    def _of_pieces(self, first: int, end: int) -> Tensor:
        pieces = [self._new.pieces.get(number, ()) for number in range(first, end)]
        pairs = sorted((piece, row) for row, ids in enumerate(pieces) for piece in ids)
        old = torch.tensor([piece for piece, _ in pairs], dtype=torch.int64)
        target = torch.tensor([row for _, row in pairs], dtype=torch.int64)
        sums = torch.zeros(end - first, self._read(slice(0, 1)).shape[1], dtype=torch.float64)
        for begin in range(0, self._new.first, BLOCK_ROWS):
            stop = min(begin + BLOCK_ROWS, self._new.first)
            inside = slice(*torch.searchsorted(old, torch.tensor([begin, stop])).tolist())
            if inside.start < inside.stop:
                block = self._read(slice(begin, stop))[old[inside] - begin].double()
                sums.index_add_(0, target[inside], block)  # on a CPU one after another, in this order
        counts = torch.tensor([len(ids) for ids in pieces], dtype=torch.float64)
        if not counts.all():
            sums[counts == 0] = self._statistics()[0]
        return sums / counts.clamp(min=1)[:, None]

    def _means(self, first: int, end: int) -> Tensor:
        return self._statistics()[0].expand(end - first, -1)

    def _samples(self, first: int, end: int) -> Tensor:
        mean, deviation = self._statistics()
        return torch.stack(
            [mean + deviation * self._standard_normal(number, len(mean)) for number in range(first, end)]
        )

    def _standard_normal(self, number: int, columns: int) -> Tensor:
        digest = hashlib.blake2b(f"{self._new.seed}/{self._name}/{number}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # torch's seeds are signed
        return torch.randn(columns, generator=generator).double()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each column over all old rows.

        NumPy adds one row after another, in one thread; the order of torch's sums depends on the number of threads.
        """
        if self._moments is None:
            columns = self._read(slice(0, 1)).shape[1]
            total = torch.zeros(columns, dtype=torch.float64)
            squares = torch.zeros(columns, dtype=torch.float64)
            for first in range(0, self._new.first, BLOCK_ROWS):
                block = self._read(slice(first, min(first + BLOCK_ROWS, self._new.first))).double().contiguous()
                total += torch.from_numpy(block.numpy().sum(axis=0))
                squares += torch.from_numpy(block.square().numpy().sum(axis=0))
            mean = total / self._new.first
            variance = (squares / self._new.first - mean.square()).clamp(min=0)
            self._moments = mean, variance.sqrt()
        return self._moments
