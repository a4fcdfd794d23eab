"""From draws to token windows: the reader that every rank shares, and the loader of one rank over a stage.

The order of the data is a function (mixture.py, permutation.py); the only state is the step at which a stage is taken
up. B sequences, L positions.
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


class SequenceReader:
    """Turns (source, ordinal) into tokens: of a source with n windows, ordinal o is window perm(o mod n), epoch o // n.

    A source that is seen as it is stored has no permutation: ordinal o is window o mod n.

    Args:
        streams: where the tokens of every source lie, and how they are cut into windows.
        seq_len: L; a window is seq_len + 1 tokens.
        seed: names the order of the windows, together with the source and the epoch.

    Raises:
        DataError: a source has no sequences of this length.
    """

    def __init__(self, streams: Mapping[str, TokenSource], *, seq_len: int, seed: int) -> None:
        self.streams, self.seq_len, self.seed = streams, seq_len, seed
        self._counts = {name: stream.windows(seq_len) for name, stream in streams.items()}

    def windows(self, draws: Sequence[Draw]) -> NDArray[np.int64]:
        """The window, counted within its source, of each draw."""
        windows = np.empty(len(draws), dtype=np.int64)
        places: dict[tuple[str, int], list[int]] = {}
        for place, draw in enumerate(draws):
            places.setdefault((draw.source, draw.ordinal // self._counts[draw.source]), []).append(place)
        for (source, epoch), where in places.items():
            count = self._counts[source]
            within = np.array([draws[place].ordinal % count for place in where])
            stored = self.streams[source].in_stored_order
            windows[where] = within if stored else permuted(within, count, f"{self.seed}/{source}/{epoch}")
        return windows

    def read(self, draws: Sequence[Draw]) -> NDArray[np.int64]:
        """The tokens of the draws, int64 [B, L + 1].

        Raises:
            DataError: a file changed under the run, or holds tokens beyond the vocabulary.
        """
        rows = zip(draws, self.windows(draws), strict=True)
        return np.stack([self.streams[draw.source].window(int(window), self.seq_len) for draw, window in rows])

    def batch_hash(self, draws: Sequence[Draw]) -> str:
        """Sixteen hexadecimal digits over the sources and windows of a global batch, in order."""
        digest = hashlib.blake2b(digest_size=8)
        for draw, window in zip(draws, self.windows(draws), strict=True):
            digest.update(f"{draw.source}:{window}\n".encode())
        return digest.hexdigest()


class _MicroBatches(Dataset[tuple[Tensor, Tensor]]):
    """Micro-batches of one rank, numbered through the stage: step * accumulation + micro."""

    def __init__(
        self,
        reader: SequenceReader,
        batch_of: Callable[[int], list[Draw]],
        *,
        accumulation: int,
        local_batch: int,
        rank: int,
    ) -> None:
        self.reader, self.batch_of = reader, batch_of
        self.accumulation, self.local_batch, self.rank = accumulation, local_batch, rank
        self._drawn: tuple[int, list[Draw]] = (-1, [])

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        step, micro = divmod(number, self.accumulation)
        if self._drawn[0] != step:
            self._drawn = (step, self.batch_of(step))
        first = (self.rank * self.accumulation + micro) * self.local_batch
        tokens = torch.from_numpy(self.reader.read(self._drawn[1][first : first + self.local_batch]))
        return tokens[:, :-1], tokens[:, 1:]


class StageLoader:
    """The micro-batches of one data-parallel rank over one stage, from any step on.

    A rank takes a contiguous run of the global batch, so that the batch is the same under every number of ranks.

    Args:
        batch_of: the plan's draws of the 0-based global batch.
        steps: of the stage.
        first_step: where to take it up.
        accumulation: micro-batches a step.
        local_batch: B of a micro-batch.
        rank: data-parallel rank.
        workers: processes that read ahead; 0 reads in this one.
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
        batches = _MicroBatches(reader, batch_of, accumulation=accumulation, local_batch=local_batch, rank=rank)
        self._accumulation, self._next = accumulation, first_step * accumulation
        numbers = range(self._next, steps * accumulation)
        # The sampler is a range that begins where the run goes on; the loader's own state is never saved.
        loader: StatefulDataLoader[Any] = StatefulDataLoader(
            batches, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=torch.cuda.is_available()
        )
        self._batches: Iterator[tuple[Tensor, Tensor]] = iter(loader)

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, L], int64, of micro-batch `micro` of step `step`; asked for in order.

        Raises:
            DataError: a file changed under the run, or holds tokens beyond the vocabulary.
        """
        assert step * self._accumulation + micro == self._next, f"batches are read in order; next is {self._next}"
        self._next += 1
        return next(self._batches)
