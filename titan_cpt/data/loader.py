"""The data loader: SequenceReader turns draws of the mixture into tokens, StageLoader serves one rank's micro-batches.

The data order is a pure function of the step (mixture.py, permutation.py), so the only state of the loader is the step
at which it starts. Shapes: B sequences, L = seq_len.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_cpt.data.formats.token_source import TokenSource
from titan_cpt.data.mixture import Draw
from titan_cpt.data.permutation import permuted
from titan_cpt.data.prefetch import Prefetcher


class SequenceReader:
    """Reads the tokens of draws: in a source of n windows, ordinal o is window perm_e(o mod n) of epoch e = o // n.

    perm_e is a permutation seeded by `seed`, the source and e; Megatron's GPTDataset stores it as its shuffle index.
    A source in stored order has no permutation: ordinal o is window o mod n.

    Args:
        sources: the open files of every source, by name.
        seq_len: L; a window has seq_len + 1 tokens: inputs are all but the last, targets all but the first.
        seed: seed of the permutations.

    Raises:
        DataError: a source has no sequences of this length.
    """

    def __init__(self, sources: Mapping[str, TokenSource], *, seq_len: int, seed: int) -> None:
        self.sources = sources
        self.seq_len = seq_len
        self.seed = seed
        self._counts = {name: source.windows(seq_len) for name, source in sources.items()}

    def windows(self, draws: Sequence[Draw]) -> NDArray[np.int64]:
        """Return the window number of each draw within its source, int64 [len(draws)]."""
        windows = np.empty(len(draws), dtype=np.int64)
        indices_by_epoch: dict[tuple[str, int], list[int]] = {}
        for index, draw in enumerate(draws):
            indices_by_epoch.setdefault((draw.source, draw.ordinal // self._counts[draw.source]), []).append(index)
        for (source, epoch), indices in indices_by_epoch.items():
            count = self._counts[source]
            within = np.array([draws[index].ordinal % count for index in indices])
            stored = self.sources[source].in_stored_order
            windows[indices] = within if stored else permuted(within, count, f"{self.seed}/{source}/{epoch}")
        return windows

    def read(self, draws: Sequence[Draw]) -> NDArray[np.int64]:
        """Return the tokens of the draws, int64 [B, L + 1].

        Raises:
            DataError: a file changed since it was opened, or contains an id outside the vocabulary.
        """
        rows = zip(draws, self.windows(draws), strict=True)
        return np.stack([self.sources[draw.source].window(int(window), self.seq_len) for draw, window in rows])

    @property
    def is_remote(self) -> bool:
        """Whether a source has files in object storage."""
        return any(source.is_remote for source in self.sources.values())

    def fetch(self, draws: Sequence[Draw]) -> None:
        """Fetch the tokens of draws that will be read soon from object storage into the local cache."""
        numbers: dict[str, list[int]] = {}
        for draw, window in zip(draws, self.windows(draws), strict=True):
            numbers.setdefault(draw.source, []).append(int(window))
        for source, windows in numbers.items():
            self.sources[source].fetch(windows, self.seq_len)

    def batch_hash(self, draws: Sequence[Draw]) -> str:
        """Hash of a global batch: 16 hexadecimal digits over its sources and windows, in order."""
        digest = hashlib.blake2b(digest_size=8)
        for draw, window in zip(draws, self.windows(draws), strict=True):
            digest.update(f"{draw.source}:{window}\n".encode())
        return digest.hexdigest()


class _MicroBatches(Dataset[tuple[Tensor, Tensor]]):
    """Micro-batches of one rank; number step * accumulation + micro of the stage."""

    def __init__(
        self,
        reader: SequenceReader,
        batch_of: Callable[[int], list[Draw]],
        *,
        accumulation: int,
        local_batch: int,
        rank: int,
    ) -> None:
        self.reader = reader
        self.batch_of = batch_of
        self.accumulation = accumulation
        self.local_batch = local_batch
        self.rank = rank
        self._drawn: tuple[int, list[Draw]] = (-1, [])

    def draws(self, number: int) -> list[Draw]:
        """The draws of a micro-batch."""
        step, micro = divmod(number, self.accumulation)
        if self._drawn[0] != step:
            self._drawn = (step, self.batch_of(step))
        first = (self.rank * self.accumulation + micro) * self.local_batch
        return self._drawn[1][first : first + self.local_batch]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(self.reader.read(self.draws(number)))
        # Contiguous: torch copies a strided tensor to the GPU through memory that is not pinned, which waits for it.
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class StageLoader:
    """The micro-batches of one data-parallel rank in one training stage, starting at any step.

    Each rank reads a contiguous part of the global batch, so the global batch does not depend on the number of ranks.

    Args:
        reader: reads the tokens of draws.
        batch_of: returns the draws of the global batch of a 0-based step.
        steps: number of steps of the stage.
        first_step: first step to load.
        accumulation: micro-batches per step (gradient accumulation).
        local_batch: B, sequences per micro-batch.
        rank: data-parallel rank.
        workers: loader processes that prefetch; 0 reads in the training process.
    """

    def __init__(
        self,
        reader: SequenceReader,
        batch_of: Callable[[int], list[Draw]],
        *,
        steps: int,
        first_step: int,
        accumulation: int,
        local_batch: int,
        rank: int,
        workers: int,
    ) -> None:
        shape = {"accumulation": accumulation, "local_batch": local_batch, "rank": rank}
        batches = _MicroBatches(reader, batch_of, **shape)
        self._accumulation = accumulation
        self._next = first_step * accumulation
        numbers = range(self._next, steps * accumulation)
        # Worker processes read ahead themselves. A thread does so for this process, which would wait for storage.
        self._prefetcher = None
        if reader.is_remote and not workers:
            self._prefetcher = Prefetcher(reader, _MicroBatches(reader, batch_of, **shape).draws, numbers)
        # The sampler starts at first_step, so the state of the StatefulDataLoader is never saved.
        loader: StatefulDataLoader[Any] = StatefulDataLoader(
            batches, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=torch.cuda.is_available()
        )
        self._batches: Iterator[tuple[Tensor, Tensor]] = iter(loader)

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, int64 [B, L] each, of micro-batch `micro` of step `step`. Call it in order.

        Raises:
            DataError: a file changed since it was opened, or contains an id outside the vocabulary.
        """
        assert step * self._accumulation + micro == self._next, f"batches are read in order; next is {self._next}"
        self._next += 1
        if self._prefetcher is not None:
            self._prefetcher.advance(self._next)
        return next(self._batches)
