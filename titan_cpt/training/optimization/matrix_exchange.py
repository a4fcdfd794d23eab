"""Whole matrices from the shards of all ranks, each on one rank, and results back, so that each is orthogonalized once.

If every rank computed every matrix, that would take many times a training step on hundreds of GPUs. Matrices are
assigned to ranks by cost, largest first. The owner receives a matrix's shards from one replica, and sends each rank its
part of the result: all-to-alls in bfloat16, in which Newton-Schulz computes anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_cpt.planning.memory import MUON_ROUND_BYTES

_BYTES = 2  # bfloat16


class Exchange(Protocol):
    """How whole matrices are made of shards: `MatrixExchange`, or `OneProcess`."""

    @property
    def rounds(self) -> Sequence[Round]:
        """The same on every rank."""

    def is_sent(self, matrix: int) -> bool:
        """Whether this rank's shard of a matrix goes to the owner."""

    def gather(self, step: Round, shards: dict[int, Tensor]) -> dict[int, Tensor]:
        """The round's matrices that this rank owns, whole, from the shards that `is_sent`; collective."""

    def scatter(self, step: Round, results: dict[int, Tensor]) -> Iterator[dict[int, Tensor]]:
        """This rank's parts of the round's results, in several collectives, from the results of the owners."""


@dataclass(frozen=True)
class Round:
    """Matrices that are orthogonalized at the same time, by number, and the batches in which results are sent back."""

    matrices: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]


class OneProcess:
    """The exchange of a single process, which has whole matrices."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self.rounds = [Round((index,), ((index,),)) for index in range(len(matrices))]

    def is_sent(self, matrix: int) -> bool:
        """Every matrix is used here."""
        return True

    def gather(self, step: Round, shards: dict[int, Tensor]) -> dict[int, Tensor]:
        """The shards are the matrices."""
        return shards

    def scatter(self, step: Round, results: dict[int, Tensor]) -> Iterator[dict[int, Tensor]]:
        """The results are whole."""
        yield results


@dataclass(frozen=True)
class _Part:
    """A rank's part of a matrix."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def of(self, matrix: Tensor) -> Tensor:
        return matrix[self.row : self.row + self.rows, self.column : self.column + self.columns]


class MatrixExchange:
    """The exchange of several ranks.

    Args:
        matrices: DTensors, the same on every rank; with any placements of which a rank's shard is one block.
        group: the ranks that hold shards of them.
    """

    def __init__(self, matrices: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        self._ranks = dist.get_world_size(group)
        self._device = matrices[0].device if matrices else torch.device("cpu")
        self._shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in matrices]
        gathered: list[list[_Part]] = [[] for _ in range(self._ranks)]
        dist.all_gather_object(gathered, [_local_part(matrix) for matrix in matrices], group=group)
        self._parts = [list(parts) for parts in zip(*gathered, strict=True)]  # by matrix, then by rank
        self._owners = assign_owners([newton_schulz_cost(*shape) for shape in self._shapes], self._ranks)
        self._senders = [_senders(parts, owner) for parts, owner in zip(self._parts, self._owners, strict=True)]
        self.rounds = self._rounds()

    def is_sent(self, matrix: int) -> bool:
        """Of replicas, only the one nearest to the owner sends."""
        return self._rank in self._senders[matrix]

    def gather(self, step: Round, shards: dict[int, Tensor]) -> dict[int, Tensor]:
        """See `Exchange`."""
        to: list[list[Tensor]] = [[] for _ in range(self._ranks)]
        sources: list[list[tuple[int, _Part]]] = [[] for _ in range(self._ranks)]
        for matrix in step.matrices:
            if self._rank in self._senders[matrix]:
                to[self._owners[matrix]].append(shards[matrix])
            if self._owners[matrix] == self._rank:
                for sender in self._senders[matrix]:
                    sources[sender].append((matrix, self._parts[matrix][sender]))
        received = self._all_to_all(to, [sum(part.size for _, part in parts) for parts in sources])
        whole = {
            matrix: torch.empty(self._shapes[matrix], dtype=torch.bfloat16, device=self._device)
            for matrix in step.matrices
            if self._owners[matrix] == self._rank
        }
        pieces = [piece for parts in sources for piece in parts]
        for (matrix, part), flat in zip(pieces, torch.split(received, [part.size for _, part in pieces]), strict=True):
            part.of(whole[matrix]).copy_(flat.view(part.rows, part.columns))
        return whole

    def scatter(self, step: Round, results: dict[int, Tensor]) -> Iterator[dict[int, Tensor]]:
        """See `Exchange`."""
        for batch in step.batches:
            to = [
                [self._parts[matrix][rank].of(results[matrix]) for matrix in batch if matrix in results]
                for rank in range(self._ranks)
            ]
            sources = [[matrix for matrix in batch if self._owners[matrix] == rank] for rank in range(self._ranks)]
            own = [self._parts[matrix][self._rank] for matrices in sources for matrix in matrices]
            sizes = [sum(self._parts[matrix][self._rank].size for matrix in matrices) for matrices in sources]
            flats = torch.split(self._all_to_all(to, sizes), [part.size for part in own])
            order = [matrix for matrices in sources for matrix in matrices]
            yield {
                matrix: flat.view(part.rows, part.columns) for matrix, part, flat in zip(order, own, flats, strict=True)
            }

    def _all_to_all(self, to: list[list[Tensor]], received: list[int]) -> Tensor:
        """Send each rank a list of bfloat16 tensors; returns what the ranks sent, in their order, flat."""
        sent = [sum(tensor.numel() for tensor in tensors) for tensors in to]
        empty = torch.empty(0, dtype=torch.bfloat16, device=self._device)
        outgoing = torch.cat([empty, *(tensor.reshape(-1) for tensors in to for tensor in tensors)])
        incoming = torch.empty(sum(received), dtype=torch.bfloat16, device=self._device)
        dist.all_to_all_single(
            incoming.view(torch.uint8),  # gloo and NCCL both move bytes
            outgoing.view(torch.uint8),
            [_BYTES * size for size in received],
            [_BYTES * size for size in sent],
            group=self._group,
        )
        return incoming

    def _rounds(self) -> list[Round]:
        """Rounds of at most MUON_ROUND_BYTES of matrices per owner, largest first."""
        rounds: list[list[int]] = []
        place = [0] * self._ranks  # the owner's current round
        used = [0] * self._ranks  # bytes in it
        costs = [newton_schulz_cost(*shape) for shape in self._shapes]
        for matrix in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
            owner, size = self._owners[matrix], self._shapes[matrix][0] * self._shapes[matrix][1] * _BYTES
            if used[owner] and used[owner] + size > MUON_ROUND_BYTES:
                place[owner] += 1
                used[owner] = 0
            used[owner] += size
            while len(rounds) <= place[owner]:
                rounds.append([])
            rounds[place[owner]].append(matrix)
        return [Round(tuple(sorted(matrices)), self._batches(sorted(matrices))) for matrices in rounds]

    def _batches(self, matrices: list[int]) -> tuple[tuple[int, ...], ...]:
        """Consecutive matrices of whose results no rank receives more than MUON_ROUND_BYTES; at least one."""
        batches: list[tuple[int, ...]] = []
        used = [0] * self._ranks
        for matrix in matrices:
            sizes = [part.size * _BYTES for part in self._parts[matrix]]
            together = [a + b for a, b in zip(used, sizes, strict=True)]
            fits = batches and max(together) <= MUON_ROUND_BYTES
            used = together if fits else sizes
            batches = [*batches[:-1], (*batches[-1], matrix)] if fits else [*batches, (matrix,)]
        return tuple(batches)


def newton_schulz_cost(rows: int, columns: int) -> int:
    """Multiplications and additions of one Newton-Schulz iteration: X X^T, A A and the product with X."""
    short, long = sorted((rows, columns))
    return 4 * short * short * long + 2 * short**3


def assign_owners(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank of each item: the largest item goes to the rank with the least work, then the next; ties by number."""
    work = [0] * ranks
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owners[item] = min(range(ranks), key=lambda rank: (work[rank], rank))
        work[owners[item]] += costs[item]
    return owners


def _local_part(matrix: Tensor) -> _Part:
    """This rank's block of a matrix."""
    assert isinstance(matrix, DTensor), "with several ranks the weights are DTensors"
    (rows, columns), (row, column) = compute_local_shape_and_global_offset(
        matrix.shape, matrix.device_mesh, matrix.placements
    )
    assert (rows, columns) == tuple(matrix.to_local().shape), "the shard is not one block of the matrix"
    return _Part(row, column, rows, columns)


def _senders(parts: Sequence[_Part], owner: int) -> list[int]:
    """The ranks whose shards the owner receives: the nearest one of those with equal shards, none with empty ones."""
    nearest: dict[_Part, int] = {}
    for rank, part in enumerate(parts):
        if part.size and (part not in nearest or abs(rank - owner) < abs(nearest[part] - owner)):
            nearest[part] = rank
    return sorted(nearest.values())
