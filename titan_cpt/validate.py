"""Loss on every dataset's fixed held-out windows, and what of it counts as forgetting and as adaptation.

Forgetting of a dataset is its loss now minus its loss when the weights had just left it, which is step 0 of the first
later stage; adaptation is the loss on the data that is new in a stage. Source: Ibrahim et al. 2024, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from titan_cpt.data.source import TokenSource
from titan_cpt.distributed.mesh import Ranks, autocast
from titan_cpt.errors import DataError
from titan_cpt.loss import summed_cross_entropy


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
    """Measures a model on fixed windows, the same ones at every call and under every number of ranks.

    Args:
        streams: held-out tokens by name.
        token_bytes: int64 [vocabulary]; bytes that each id stands for.
        sequences: windows of each stream, evenly spread; all of them where there are fewer.
        seq_len: L.
        local_batch: B of one forward pass.
        precision: what matrices are multiplied in.

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
        precision: torch.dtype,
        ranks: Ranks,
    ) -> None:
        self.streams, self.seq_len, self.local_batch = streams, seq_len, local_batch
        self.sequences, self.precision, self.ranks = sequences, precision, ranks
        for name, stream in streams.items():
            if not stream.windows(seq_len):
                raise DataError(
                    f"datasets.{name.replace('.', '.domains.')}.validation: {stream.tokens} tokens are fewer than one "
                    f"sequence of {seq_len} + 1; give it more, or leave it out"
                )
        self.token_bytes = torch.from_numpy(token_bytes).to(ranks.device)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, ValidationLoss]:
        """The loss on every stream; collective, the same result on every rank.

        Raises:
            DataError: a stream cannot be read.
        """
        return {name: self._loss(model, stream) for name, stream in self.streams.items()}

    def _loss(self, model: nn.Module, stream: TokenSource) -> ValidationLoss:
        windows = fixed_windows(stream.windows(self.seq_len), self.sequences)
        sums = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)  # nats, tokens, bytes
        per_pass = self.ranks.world_size * self.local_batch
        for start in range(0, len(windows), per_pass):
            # Every rank runs every pass, since a sharded forward is collective; one with no window left counts nothing.
            first = start + self.ranks.rank * self.local_batch
            mine = windows[first : first + self.local_batch]
            tokens = [stream.window(window, self.seq_len) for window in mine or windows[:1]]
            batch = torch.from_numpy(np.stack(tokens)).to(self.ranks.device)
            nats, targets = self._nats(model, batch)
            if mine:
                sums += torch.stack([nats, torch.tensor(float(targets.numel())), self.token_bytes[targets].sum()])
        if dist.is_initialized():
            dist.all_reduce(sums)
        nats, tokens, length = sums.tolist()
        return ValidationLoss(nats / tokens, nats / math.log(2) / length if length else math.nan)

    def _nats(self, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        inputs_BL, targets_BL = tokens[:, :-1], tokens[:, 1:]
        with autocast(self.ranks, self.precision):
            logits_BLV = model(inputs_BL)
        return summed_cross_entropy(logits_BLV, targets_BL), targets_BL


def fixed_windows(available: int, wanted: int) -> list[int]:
    """Evenly spread window numbers, the same ones for ever: the middles of `wanted` equal parts."""
    count = min(available, wanted)
    return [(2 * part + 1) * available // (2 * count) for part in range(count)]
