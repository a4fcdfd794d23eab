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


class Validator:
    """Measures the loss on fixed windows: the same ones at every call and on any number of ranks.

    Attributes:
        identities: by dataset, a hash (16 hexadecimal digits) of everything except the weights that determines the
            loss: tokens, windows, and bytes of each id. Losses with different identities are not comparable.

    Args:
        streams: validation tokens by dataset.
        token_bytes: int64 [V]; the number of bytes of each id's text.
        sequences: number of windows per dataset, evenly spaced; if a dataset has fewer, all of them.
        seq_len: L, target tokens of a window.
        local_batch: B, windows of one forward pass.
        mesh: its data-parallel ranks share the windows.
        documents: document mask and positions; None without both.

    Raises:
        DataError: a stream is shorter than one window.
    """

    def __init__(
        self,
        streams: Mapping[str, TokenSource],
        token_bytes: NDArray[np.int64],
        *,
        sequences: int,
        seq_len: int,
        local_batch: int,
        mesh: Mesh,
        documents: DocumentSettings | None = None,
    ) -> None:
        self.streams = streams
        self.documents = documents
        self.seq_len = seq_len
        self.local_batch = local_batch
        self.sequences = sequences
        self.mesh = mesh
        for name, stream in streams.items():
            if not stream.windows(seq_len):
                raise DataError(
                    f"datasets.{name.replace('.', '.domains.')}.validation: {stream.tokens} tokens are fewer than one "
                    f"sequence of {seq_len} + 1; give it more tokens, or remove it"
                )
        self.token_bytes = torch.from_numpy(token_bytes).to(mesh.process.device)
        self.identities = {name: self._identity(stream, token_bytes) for name, stream in streams.items()}

    def _identity(self, stream: TokenSource, token_bytes: NDArray[np.int64]) -> str:
        """A dataset's identity. It excludes the batch size, which changes only the last bits of a loss."""
        available = stream.windows(self.seq_len)
        chosen = [stream.fingerprint(), self.seq_len, available, min(available, self.sequences)]
        if self.documents is not None:
            chosen.append(dataclasses.asdict(self.documents))
        digest = hashlib.sha256(json.dumps(chosen).encode() + token_bytes.tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def measure(
        self, runner: ModelRunner, *, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, ValidationLoss] | None:
        """The loss of every dataset; collective, the same result on every rank.

        Args:
            interrupted: called before each dataset, returns the same on every rank; if True, the result is None.

        Raises:
            DataError: validation tokens cannot be read.
        """
        losses = {}
        for name, stream in self.streams.items():
            if interrupted():
                return None
            losses[name] = self._loss(runner, stream)
        return losses

    def _loss(self, runner: ModelRunner, stream: TokenSource) -> ValidationLoss:
        sums = torch.zeros(3, dtype=torch.float64, device=self.mesh.process.device)  # nats, tokens, bytes
        for batch, counted in self._batches(stream):
            nats_B = runner.per_sequence_loss(batch)[:counted].double()
            bytes_BL = self.token_bytes[batch.targets_BL[:counted]]
            sums += torch.stack([nats_B.sum(), sums.new_tensor(bytes_BL.numel()), bytes_BL.sum().double()])
        if dist.is_initialized():
            dist.all_reduce(sums)  # ranks that share sequences add them several times; the ratios below cancel that
        nats, target_tokens, text_bytes = sums.tolist()
        return ValidationLoss(nats / target_tokens, nats / math.log(2) / text_bytes if text_bytes else math.nan)

    def batches(self, dataset: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's windows of a dataset as (inputs_BL, targets_BL); targets that do not count are IGNORED_TARGET."""
        for batch, counted in self._batches(self.streams[dataset]):
            targets_BL = batch.targets_BL.clone()
            targets_BL[counted:] = IGNORED_TARGET
            yield batch.inputs_BL, targets_BL

    def with_documents(self, batch: Batch) -> Batch:
        """The batch with its documents, for the validation's document mask and positions."""
        return batch if self.documents is None else self.documents.added_to(batch)

    def _batches(self, stream: TokenSource) -> Iterator[tuple[Batch, int]]:
        """Full batches of this rank's windows, and how many sequences of each count; as many on every rank."""
        windows = evenly_spaced(stream.windows(self.seq_len), self.sequences)
        rows = self.local_batch
        for start in range(0, len(windows), self.mesh.parallel_dims.data_parallel * rows):
            # Every rank runs every forward pass with a full batch, since a sharded forward is collective and pipeline
            # shapes are fixed; windows that pad the last batch do not count.
            first = start + self.mesh.data_rank * rows
            local_windows = windows[first : first + rows]
            padded = local_windows + windows[:1] * (rows - len(local_windows))
            tokens = torch.from_numpy(np.stack([stream.window(window, self.seq_len) for window in padded]))
            tokens = tokens.to(self.mesh.process.device)
            yield self.with_documents(Batch(tokens[:, :-1], tokens[:, 1:])), len(local_windows)
