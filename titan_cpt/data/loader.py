"""The data loader: SequenceReader turns draws of the mixture into tokens, StageLoader serves one rank's micro-batches.

The data order is a pure function of the step (mixture.py, permutation.py), so the only state of the loader is the step
at which it starts. Shapes: B sequences, L = seq_len.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_cpt.common.batch_sizes import BatchSizes
from titan_cpt.data.batch import Batch
from titan_cpt.data.documents import DocumentSettings
from titan_cpt.data.mixture import Draw
from titan_cpt.data.packing.packed_tokens import PackedRow, PackedTokens
from titan_cpt.data.permutation import permuted
from titan_cpt.data.prefetch import Prefetcher
from titan_cpt.data.trained_text import TrainedPart
from titan_cpt.data.training_sources import TrainingSource


class Rows(NamedTuple):
    """The sequences of several draws.

    Attributes:
        tokens: int64 [B, L + 1]: inputs are all but the last.
        starts: for each sequence the positions, except 0, where a piece begins that does not continue the text before.
        targets: int64 [B, L]: the token that follows in the text, or NO_TARGET.
    """

    tokens: NDArray[np.int64]
    starts: list[tuple[int, ...]]
    targets: NDArray[np.int64]


class SequenceReader:
    """Reads the tokens of draws: in a source of n windows, ordinal o is window perm_e(o mod n) of epoch e = o // n.

    perm_e is a permutation seeded by `seed`, the source and e; Megatron's GPTDataset stores it as its shuffle index.
    A source in stored order has no permutation: ordinal o is window o mod n. Each sequence length has its own windows.

    Args:
        sources: the open files of every source, by name.
        seq_len: L; a window has seq_len + 1 tokens: inputs are all but the last, targets all but the first.
        seed: seed of the permutations.
    """

    def __init__(self, sources: Mapping[str, TrainingSource], *, seq_len: int, seed: int) -> None:
        self.sources = sources
        self.seq_len = seq_len
        self.seed = seed
        self.packs = any(isinstance(source, PackedTokens) for source in sources.values())
        self._counts: dict[tuple[str, int], int] = {}

    def windows(self, draws: Sequence[Draw]) -> NDArray[np.int64]:
        """Return the window number within its source of each draw, none of which has parts, int64 [len(draws)].

        Raises:
            DataError: a source has no sequences of this length.
        """
        return self._windows([(draw.source, self.seq_len, draw.ordinal) for draw in draws])

    def sequences(self, draws: Sequence[Draw]) -> list[list[Any]]:
        """Return [source, window] of each draw; [source, [[seq_len, window, start, stop], ...]] if it has parts."""
        return [
            [draw.source, found if isinstance(found, int) else [[*part] for part in found]]
            for draw, found in zip(draws, self._located(draws), strict=True)
        ]

    def read(self, draws: Sequence[Draw]) -> Rows:
        """Return the sequences of the draws.

        Raises:
            DataError: a file changed since it was opened, or contains an id outside the vocabulary.
        """
        found = [self._row(draw.source, located) for draw, located in zip(draws, self._located(draws), strict=True)]
        tokens = np.stack([row.tokens for row in found])
        own_targets = self.packs or any(draw.parts for draw in draws)
        targets = np.stack([row.targets for row in found]) if own_targets else tokens[:, 1:]
        return Rows(tokens, [row.starts for row in found], targets)

    def target_tokens(self, draws: Sequence[Draw]) -> int:
        """Return how many positions of the draws have a target: all, except at the ends of packed documents.

        It is a function of the draws and needs no communication.
        """
        total = len(draws) * self.seq_len
        if not self.packs:
            return total
        whole: dict[str, list[int]] = {}
        for draw, located in zip(draws, self._located(draws), strict=True):
            source = self.sources[draw.source]
            if not isinstance(source, PackedTokens):
                continue
            if isinstance(located, int):
                whole.setdefault(draw.source, []).append(located)
                continue
            for part in located:
                total += source.targets_within(part.ordinal, part.seq_len, part.start, part.stop)
            total -= self.seq_len
        for name, windows in whole.items():
            source = self.sources[name]
            assert isinstance(source, PackedTokens), "it was one above"
            total += source.target_tokens(windows, self.seq_len) - len(windows) * self.seq_len
        return total

    @property
    def is_remote(self) -> bool:
        """Whether a source has files in object storage."""
        return any(source.is_remote for source in self.sources.values())

    def fetch(self, draws: Sequence[Draw]) -> None:
        """Fetch the tokens of draws that will be read soon from object storage into the local cache."""
        numbers: dict[tuple[str, int], list[int]] = {}
        for draw, found in zip(draws, self._located(draws), strict=True):
            if isinstance(found, int):
                numbers.setdefault((draw.source, self.seq_len), []).append(found)
            else:
                for part in found:
                    numbers.setdefault((draw.source, part.seq_len), []).append(part.ordinal)
        for (source, seq_len), windows in numbers.items():
            self.sources[source].fetch(windows, seq_len)

    def batch_hash(self, draws: Sequence[Draw]) -> str:
        """Hash of a global batch: 16 hexadecimal digits over its sources and windows, in order."""
        digest = hashlib.blake2b(digest_size=8)
        for draw, window in zip(draws, self._located(draws), strict=True):
            shown = window if isinstance(window, int) else [[*part] for part in window]
            digest.update(f"{draw.source}:{shown}\n".encode())
        return digest.hexdigest()

    def _row(self, source: str, located: int | list[TrainedPart]) -> PackedRow:
        """A window, or parts of windows, one after another."""
        if isinstance(located, int):
            return self._window(source, located, self.seq_len)
        # The last target of a part is the token that follows it in its own window.
        rows = [self._window(source, part.ordinal, part.seq_len) for part in located]
        inputs = [row.tokens[part.start : part.stop] for row, part in zip(rows, located, strict=True)]
        targets = [row.targets[part.start : part.stop] for row, part in zip(rows, located, strict=True)]
        starts: list[int] = []
        position = 0
        for row, part in zip(rows, located, strict=True):
            inside = [start - part.start for start in row.starts if part.start < start < part.stop]
            starts += [position + start for start in (0, *inside)]
            position += part.stop - part.start
        last = rows[-1].tokens[located[-1].stop :][:1]
        return PackedRow(np.concatenate([*inputs, last]), np.concatenate(targets), tuple(starts[1:]))

    def _window(self, source: str, number: int, seq_len: int) -> PackedRow:
        tokens = self.sources[source]
        if isinstance(tokens, PackedTokens):
            return tokens.row(number, seq_len)
        window = tokens.window(number, seq_len)
        return PackedRow(window, window[1:], ())

    def _located(self, draws: Sequence[Draw]) -> list[int | list[TrainedPart]]:
        """The window number of each draw; of a draw with parts, the parts with window numbers in place of ordinals."""
        if not any(draw.parts for draw in draws):
            return [*self.windows(draws).tolist()]
        whole = iter(self.windows([draw for draw in draws if not draw.parts]).tolist())
        parts = [(draw.source, part.seq_len, part.ordinal) for draw in draws for part in draw.parts]
        numbers = iter(self._windows(parts).tolist())
        return [
            [part._replace(ordinal=next(numbers)) for part in draw.parts] if draw.parts else next(whole)
            for draw in draws
        ]

    def _windows(self, sequences: Sequence[tuple[str, int, int]]) -> NDArray[np.int64]:
        """The window number of each (source, sequence length, ordinal)."""
        windows = np.empty(len(sequences), dtype=np.int64)
        indices_of: dict[tuple[str, int], list[int]] = {}
        for index, (source, seq_len, _) in enumerate(sequences):
            indices_of.setdefault((source, seq_len), []).append(index)
        for (source, seq_len), indices in indices_of.items():
            count = self._count(source, seq_len)
            epochs, found = np.divmod(np.array([sequences[index][2] for index in indices]), count)
            if not self.sources[source].in_stored_order:
                for epoch in np.unique(epochs):
                    of_epoch = epochs == epoch
                    found[of_epoch] = permuted(found[of_epoch], count, f"{self.seed}/{source}/{epoch}")
            windows[indices] = found
        return windows

    def _count(self, source: str, seq_len: int) -> int:
        if (source, seq_len) not in self._counts:
            self._counts[source, seq_len] = self.sources[source].windows(seq_len)
        return self._counts[source, seq_len]


class _MicroBatches(Dataset[Batch]):
    """Micro-batches of one rank, numbered from the beginning of the stage."""

    def __init__(
        self,
        reader: SequenceReader,
        batch_of: Callable[[int], list[Draw]],
        *,
        batch_sizes: BatchSizes,
        local_batch: int,
        rank: int,
        ranks: int,
        source_numbers: Mapping[tuple[str, bool], int] | None = None,
        documents: DocumentSettings | None = None,
    ) -> None:
        self.reader = reader
        self.batch_of = batch_of
        self.batch_sizes = batch_sizes
        self.local_batch = local_batch
        self.rank = rank
        self.ranks = ranks
        self.source_numbers = source_numbers
        self.documents = documents
        self._drawn: tuple[int, list[Draw]] = (-1, [])

    def number(self, step: int) -> int:
        """The number of the first micro-batch of a step."""
        return self.batch_sizes.sequences_before(step) // (self.local_batch * self.ranks)

    def draws(self, number: int) -> list[Draw]:
        """The draws of a micro-batch."""
        step = self.batch_sizes.step_of(number * self.local_batch * self.ranks)
        if self._drawn[0] != step:
            self._drawn = (step, self.batch_of(step))
        draws = self._drawn[1]
        first = self.rank * len(draws) // self.ranks + (number - self.number(step)) * self.local_batch
        return draws[first : first + self.local_batch]

    def __getitem__(self, number: int) -> Batch:
        draws = self.draws(number)
        rows = self.reader.read(draws)
        numbers = self.source_numbers
        batch = Batch(
            # Contiguous: torch copies a strided tensor to the GPU through memory that is not pinned, and waits for it.
            torch.from_numpy(rows.tokens[:, :-1]).contiguous(),
            torch.from_numpy(rows.targets).contiguous(),
            sources_B=torch.tensor([numbers[draw.source, draw.replayed] for draw in draws]) if numbers else None,
        )
        return batch if self.documents is None else self.documents.added_to(batch, rows.starts)


class StageLoader:
    """The micro-batches of one data-parallel rank in one training stage, starting at any step.

    Each rank reads a contiguous part of the global batch, so the global batch does not depend on the number of ranks.

    Args:
        reader: reads the tokens of draws.
        batch_of: returns the draws of the global batch of a 0-based step.
        batch_sizes: the global batch size of every step, a multiple of ranks x local_batch.
        steps: number of steps of the stage.
        first_step: first step to load.
        local_batch: B, sequences per micro-batch.
        rank: data-parallel rank.
        ranks: number of data-parallel ranks.
        workers: loader processes that prefetch; 0 reads in the training process.
        source_numbers: number of every source by (source, replayed), for `Batch.sources_B`; None without.
        documents: for `Batch.starts_BL` and `Batch.positions_BL`; None without.
    """

    def __init__(
        self,
        reader: SequenceReader,
        batch_of: Callable[[int], list[Draw]],
        *,
        batch_sizes: BatchSizes,
        steps: int,
        first_step: int,
        local_batch: int,
        rank: int,
        ranks: int,
        workers: int,
        source_numbers: Mapping[tuple[str, bool], int] | None = None,
        documents: DocumentSettings | None = None,
    ) -> None:
        how: dict[str, Any] = {"batch_sizes": batch_sizes, "local_batch": local_batch, "rank": rank, "ranks": ranks}
        batches = _MicroBatches(reader, batch_of, **how, source_numbers=source_numbers, documents=documents)
        self._number = batches.number
        self._next = batches.number(first_step)
        numbers = range(self._next, batches.number(steps))
        # Worker processes read ahead themselves. A thread does so for this process, which would wait for storage.
        self._prefetcher = None
        if reader.is_remote and not workers:
            self._prefetcher = Prefetcher(reader, _MicroBatches(reader, batch_of, **how).draws, numbers)
        # The sampler starts at first_step, so the state of the StatefulDataLoader is never saved.
        loader: StatefulDataLoader[Any] = StatefulDataLoader(
            batches, batch_size=None, sampler=numbers, num_workers=workers, pin_memory=torch.cuda.is_available()
        )
        self._batches: Iterator[Batch] = iter(loader)

    def batch(self, step: int, micro: int) -> Batch:
        """Return micro-batch `micro` of step `step`. Call it in order.

        Raises:
            DataError: a file changed since it was opened, or contains an id outside the vocabulary.
        """
        assert self._number(step) + micro == self._next, f"batches are read in order; next is {self._next}"
        self._next += 1
        if self._prefetcher is not None:
            self._prefetcher.advance(self._next)
        return next(self._batches)
