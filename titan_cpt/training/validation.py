"""Validation loss of every dataset, on fixed windows of its validation tokens.

    forgetting(dataset, step) = loss(dataset, step) - loss(dataset, step 0 of the first later stage)
    adaptation(stage)         = loss on the data that is new in the stage, at its end

Source: Ibrahim et al. 2024, arXiv:2403.08763, section 5.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from titan_cpt.common.numbers import evenly_spaced
from titan_cpt.data.formats.token_source import TokenSource
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.errors import DataError
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
        identities: by dataset, 16 hexadecimal digits over everything but the weights that determines the loss: the
            tokens, the windows, and the bytes of each id. Losses with different identities are not comparable.

    Args:
        streams: validation tokens by dataset.
        token_bytes: int64 [V]; the number of bytes of each id's text.
        sequences: windows per dataset, evenly spaced; all windows where there are fewer.
        seq_len: L.
        local_batch: B of one forward pass.

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
    ) -> None:
        self.streams, self.seq_len, self.local_batch = streams, seq_len, local_batch
        self.sequences, self.mesh = sequences, mesh
        for name, stream in streams.items():
            if not stream.windows(seq_len):
                raise DataError(
                    f"datasets.{name.replace('.', '.domains.')}.validation: {stream.tokens} tokens are fewer than one "
                    f"sequence of {seq_len} + 1; give it more tokens, or remove it"
                )
        self.token_bytes = torch.from_numpy(token_bytes).to(mesh.process.device)
        self.identities = {name: self._identity(stream, token_bytes) for name, stream in streams.items()}

    def _identity(self, stream: TokenSource, token_bytes: NDArray[np.int64]) -> str:
        """The batch size is not part of it: it changes the last bits of a loss, not what is measured."""
        available = stream.windows(self.seq_len)
        chosen = [stream.fingerprint(), self.seq_len, available, min(available, self.sequences)]
        digest = hashlib.sha256(json.dumps(chosen).encode() + token_bytes.tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def measure(
        self, engine: ModelRunner, *, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, ValidationLoss] | None:
        """The loss of every dataset; collective, the same result on every rank.

        Args:
            interrupted: called before each dataset, on every rank, with the same answer; if true, the result is None.

        Raises:
            DataError: validation tokens cannot be read.
        """
        losses = {}
        for name, stream in self.streams.items():
            if interrupted():
                return None
            losses[name] = self._loss(engine, stream)
        return losses

    def _loss(self, engine: ModelRunner, stream: TokenSource) -> ValidationLoss:
        windows = evenly_spaced(stream.windows(self.seq_len), self.sequences)
        device, rows = self.mesh.process.device, self.local_batch
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
        for start in range(0, len(windows), self.mesh.parallel_dims.data_parallel * rows):
            # Every rank runs every pass with a whole batch, since a sharded forward is collective and a pipeline's
            # shapes are fixed; windows that fill up the last batch do not count.
            first = start + self.mesh.data_rank * rows
            mine = windows[first : first + rows]
            filled = mine + windows[:1] * (rows - len(mine))
            tokens = np.stack([stream.window(window, self.seq_len) for window in filled])
            batch = torch.from_numpy(tokens).to(device)
            nats_B = engine.per_sequence_loss(batch[:, :-1], batch[:, 1:])[: len(mine)].double()
            bytes_BL = self.token_bytes[batch[: len(mine), 1:]]
            sums += torch.stack([nats_B.sum(), sums.new_tensor(bytes_BL.numel()), bytes_BL.sum().double()])
        if dist.is_initialized():
            dist.all_reduce(sums)  # ranks that share sequences add them several times; the ratios below cancel that
        nats, counted, length = sums.tolist()
        return ValidationLoss(nats / counted, nats / math.log(2) / length if length else math.nan)
