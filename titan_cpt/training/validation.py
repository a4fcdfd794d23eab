"""Loss on every dataset's fixed held-out windows, and what of it counts as forgetting and as adaptation.

Forgetting of a dataset is its loss now minus its loss when the weights had just left it, which is step 0 of the first
later stage; adaptation is the loss on the data that is new in a stage. Source: Ibrahim et al. 2024, section 5.
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
        bits_per_byte: the same text's bits over its bytes, comparable between tokenizers and languages.
    """

    nats_per_token: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """exp of the loss per token."""
        return math.exp(min(self.nats_per_token, 700.0))


class Validator:
    """Measures what an engine runs on fixed windows, the same ones at every call and under every number of ranks.

    Attributes:
        identities: by name, 16 hexadecimal digits over what decides the loss besides the weights: the tokens, the
            windows chosen of them, and the bytes of each id. Losses of two identities are not comparable.

    Args:
        streams: held-out tokens by name.
        token_bytes: int64 [vocabulary]; bytes that each id stands for.
        sequences: windows of each stream, evenly spread; all of them where there are fewer.
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
                    f"sequence of {seq_len} + 1; give it more, or leave it out"
                )
        self.token_bytes = torch.from_numpy(token_bytes).to(mesh.process.device)
        self.identities = {name: self._identity(stream, token_bytes) for name, stream in streams.items()}

    def _identity(self, stream: TokenSource, token_bytes: NDArray[np.int64]) -> str:
        """The batch of a forward pass is left out: it changes the last bits of a loss and not what is measured."""
        available = stream.windows(self.seq_len)
        chosen = [stream.fingerprint(), self.seq_len, available, min(available, self.sequences)]
        digest = hashlib.sha256(json.dumps(chosen).encode() + token_bytes.tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def measure(
        self, engine: ModelRunner, *, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, ValidationLoss] | None:
        """The loss on every stream; collective, the same result on every rank.

        Args:
            interrupted: asked before each stream, on every rank, with the same answer; if true there is no result.

        Raises:
            DataError: a stream cannot be read.
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
            # shapes are fixed; windows that stand in for missing ones count nothing.
            first = start + self.mesh.data_rank * rows
            mine = windows[first : first + rows]
            filled = mine + windows[:1] * (rows - len(mine))
            tokens = np.stack([stream.window(window, self.seq_len) for window in filled])
            batch = torch.from_numpy(tokens).to(device)
            nats_B = engine.per_sequence_loss(batch[:, :-1], batch[:, 1:])[: len(mine)].double()
            bytes_BL = self.token_bytes[batch[: len(mine), 1:]]
            sums += torch.stack([nats_B.sum(), sums.new_tensor(bytes_BL.numel()), bytes_BL.sum().double()])
        if dist.is_initialized():
            dist.all_reduce(sums)  # ranks that share their sequences count them alike, which the ratios below undo
        nats, counted, length = sums.tolist()
        return ValidationLoss(nats / counted, nats / math.log(2) / length if length else math.nan)
