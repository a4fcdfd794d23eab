"""Validation loss of every dataset, on fixed windows of its validation tokens.

    forgetting(dataset, step) = loss(dataset, step) - loss(dataset, step 0 of the first later stage)
    adaptation(stage)         = loss on the data that is new in the stage, at its end

Source: Ibrahim et al. 2024, arXiv:2403.08763, section 5.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from titan_cpt.common.numbers import evenly_spaced
from titan_cpt.data.batch import Batch
from titan_cpt.data.documents import DocumentSettings
from titan_cpt.data.formats.token_source import TokenSource
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.errors import DataError
from titan_cpt.evaluation.registered_metrics import IGNORED_TARGET
from titan_cpt.training.forward_backward import ModelRunner


@dataclass(frozen=True)
class ValidationLoss:
    """The loss on one dataset.

    Attributes:
        nats_per_token: mean over all target tokens.
        bits_per_byte: the same text's loss in bits, divided by its bytes; comparable between tokenizers.
    """

    nats_per_token: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """exp of the loss per token."""
        return math.exp(min(self.nats_per_token, 700.0))


@dataclass(frozen=True)
class ValidationWindows:
    """How validation tokens are cut into windows, and computed.

    Attributes:
        seq_len: L, target tokens of a window.
        local_batch: B, windows of one forward pass; it changes only the last bits of a loss.
        documents: document mask and positions; None without both.
    """

    seq_len: int
    local_batch: int
    documents: DocumentSettings | None = None

    def label(self, dataset: str, usual: ValidationWindows) -> str:
        """What a loss on these windows is called: the dataset's name, and what differs from the run's usual windows."""
        ours, theirs = (
            (
                each.documents is not None and each.documents.mask,
                each.documents is not None and each.documents.positions,
            )
            for each in (self, usual)
        )
        label = f"{dataset}@{self.seq_len}"
        if ours[0] != theirs[0]:
            label += "-masked" if ours[0] else "-unmasked"
        if ours[1] != theirs[1]:
            label += "-document-positions" if ours[1] else "-sequence-positions"
        return dataset if label == f"{dataset}@{usual.seq_len}" else label


class Validator:
    """Measures the loss on fixed windows: the same ones at every call and on any number of ranks.

    Every dataset is measured on the same windows during the whole run, so that its losses are comparable. A stage that
    trains with another length or other documents is also measured on windows of its own, under a label of their own.

    Attributes:
        identities: by label, a hash (16 hexadecimal digits) of everything except the weights that determines the
            loss: tokens, windows, and bytes of each id. Losses with different identities are not comparable.
        lacking: label -> why it is not measured: a dataset may be too short for the windows of a stage.

    Args:
        streams: validation tokens by dataset.
        token_bytes: int64 [V]; the number of bytes of each id's text.
        sequences: number of windows per dataset, evenly spaced; if a dataset has fewer, all of them.
        windows: those of the whole run, whose labels are the names of the datasets.
        by_stage: the windows of each stage.
        mesh: its data-parallel ranks share the windows.

    Raises:
        DataError: a stream is shorter than one of the run's windows.
    """

    def __init__(
        self,
        streams: Mapping[str, TokenSource],
        token_bytes: NDArray[np.int64],
        *,
        sequences: int,
        windows: ValidationWindows,
        by_stage: Mapping[str, ValidationWindows],
        mesh: Mesh,
    ) -> None:
        self.streams = streams
        self.windows = windows
        self.sequences = sequences
        self.mesh = mesh
        self.lacking: dict[str, str] = {}
        self._measured: dict[str, list[tuple[str, TokenSource, ValidationWindows]]] = {}
        """By stage: label, tokens and windows of each loss."""
        self.token_bytes = torch.from_numpy(token_bytes).to(mesh.process.device)
        usual = [(name, stream, windows) for name, stream in streams.items()]
        for name, stream, _ in usual:
            if problem := _too_short(name, stream, windows):
                raise DataError(f"{problem}; give it more tokens, or remove it")
        for stage, own in by_stage.items():
            further = [
                (label, stream, own) for name, stream in streams.items() if (label := own.label(name, windows)) != name
            ]
            self.lacking |= {label: why for label, stream, _ in further if (why := _too_short(label, stream, own))}
            self._measured[stage] = [*usual, *(each for each in further if each[0] not in self.lacking)]
        measured = {each[0]: each for of_stage in (usual, *self._measured.values()) for each in of_stage}
        self.identities = {label: self._identity(stream, own, token_bytes) for label, stream, own in measured.values()}

    def _identity(self, stream: TokenSource, windows: ValidationWindows, token_bytes: NDArray[np.int64]) -> str:
        """The identity of a loss. It excludes the batch size, which changes only the last bits of a loss."""
        available = stream.windows(windows.seq_len)
        chosen = [stream.fingerprint(), windows.seq_len, available, min(available, self.sequences)]
        if windows.documents is not None:
            chosen.append(dataclasses.asdict(windows.documents))
        digest = hashlib.sha256(json.dumps(chosen).encode() + token_bytes.tobytes())
        return digest.hexdigest()[:16]

    def labels(self, stage: str) -> list[str]:
        """The labels that are measured in a stage."""
        return [label for label, _, _ in self._measured[stage]]

    @torch.no_grad()
    def measure(
        self, runner: ModelRunner, stage: str, *, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, ValidationLoss] | None:
        """The loss of every label of a stage; collective, the same result on every rank.

        Args:
            interrupted: called before each dataset, returns the same on every rank; if True, the result is None.

        Raises:
            DataError: validation tokens cannot be read.
        """
        losses = {}
        for label, stream, windows in self._measured[stage]:
            if interrupted():
                return None
            losses[label] = self._loss(runner, stream, windows)
        return losses

    def _loss(self, runner: ModelRunner, stream: TokenSource, windows: ValidationWindows) -> ValidationLoss:
        sums = torch.zeros(3, dtype=torch.float64, device=self.mesh.process.device)  # nats, tokens, bytes
        for batch, counted in self._batches(stream, windows):
            nats_B = runner.per_sequence_loss(batch)[:counted].double()
            bytes_BL = self.token_bytes[batch.targets_BL[:counted]]
            sums += torch.stack([nats_B.sum(), sums.new_tensor(bytes_BL.numel()), bytes_BL.sum().double()])
        if dist.is_initialized():
            dist.all_reduce(sums)  # ranks that share sequences add them several times; the ratios below cancel that
        nats, target_tokens, text_bytes = sums.tolist()
        return ValidationLoss(nats / target_tokens, nats / math.log(2) / text_bytes if text_bytes else math.nan)

    def batches(self, dataset: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's windows of a dataset as (inputs_BL, targets_BL); targets that do not count are IGNORED_TARGET."""
        for batch, counted in self._batches(self.streams[dataset], self.windows):
            targets_BL = batch.targets_BL.clone()
            targets_BL[counted:] = IGNORED_TARGET
            yield batch.inputs_BL, targets_BL

    def with_documents(self, batch: Batch) -> Batch:
        """The batch with its documents, for the document mask and positions of the run's validation."""
        return batch if self.windows.documents is None else self.windows.documents.added_to(batch)

    def _batches(self, stream: TokenSource, windows: ValidationWindows) -> Iterator[tuple[Batch, int]]:
        """Full batches of this rank's windows, and how many sequences of each count; as many on every rank."""
        numbers = evenly_spaced(stream.windows(windows.seq_len), self.sequences)
        rows = windows.local_batch
        for start in range(0, len(numbers), self.mesh.parallel_dims.data_parallel * rows):
            # Every rank runs every forward pass with a full batch, since a sharded forward is collective and pipeline
            # shapes are fixed; windows that pad the last batch do not count.
            first = start + self.mesh.data_rank * rows
            local_numbers = numbers[first : first + rows]
            padded = local_numbers + numbers[:1] * (rows - len(local_numbers))
            tokens = torch.from_numpy(np.stack([stream.window(number, windows.seq_len) for number in padded]))
            batch = Batch(tokens[:, :-1], tokens[:, 1:])
            if windows.documents is not None:  # added on the host, which then knows their bounds
                batch = windows.documents.added_to(batch)
            tokens = tokens.to(self.mesh.process.device)
            yield dataclasses.replace(batch, inputs_BL=tokens[:, :-1], targets_BL=tokens[:, 1:]), len(local_numbers)


def _too_short(label: str, stream: TokenSource, windows: ValidationWindows) -> str | None:
    """Why a dataset has no window of this length; None if it has one."""
    try:
        available = stream.windows(windows.seq_len)
    except DataError as error:  # a format whose sequences have one length
        return str(error)
    if available:
        return None
    table = f"datasets.{label.partition('@')[0].replace('.', '.domains.')}.validation"
    return f"{table}: {stream.tokens} tokens are fewer than one sequence of {windows.seq_len} + 1"
