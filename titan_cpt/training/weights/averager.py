"""The average of a stage's newest weights: takes snapshots, combines them, and says what checkpoints keep of it.

Training never reads it. Sums are computed in float64, element by element, and rounded once to float32, so that equal
snapshots give the same bits on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from titan_cpt.checkpoint.state_dict import WeightCopy
from titan_cpt.common.weights.averaging import Averaging
from titan_cpt.common.weights.named_weights import AVERAGE

_SNAPSHOTS = "snapshots"


class Averager:
    """The average of the weights of one stage.

    Attributes:
        steps: steps done at which the newest snapshots were taken, oldest first, at most as many as a window has.
        count: number of snapshots of the stage so far.

    Args:
        averaging: kind, window and distance.
        empty: makes an uninitialized copy of a local weight, where copies are kept.
    """

    def __init__(self, averaging: Averaging, empty: Callable[[Tensor], Tensor]) -> None:
        self.averaging = averaging
        self.steps: list[int] = []
        self.count = 0
        self._empty = empty
        self._ring: list[WeightCopy] = []  # oldest first; for an EMA its one copy
        self._average: WeightCopy | None = None  # of the snapshots taken so far, once it has been computed

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor], steps_done: int) -> None:
        """Take a snapshot.

        Args:
            weights: this rank's shards, by parameter name.
        """
        self.count += 1
        known = self.steps if self._ring else []  # a stage's end has no snapshots for a branch to continue with
        self.steps = [*known, steps_done][-self.averaging.size :]
        self._average = None
        if self.averaging.kind == "ema" and self._ring:
            _move_towards(self._ring[0], weights, self.averaging.ema_share(self.count))
            return
        full = len(self._ring) == self.averaging.stored
        copy = self._ring.pop(0) if full else {name: self._empty(weight) for name, weight in weights.items()}
        for name, weight in weights.items():
            copy[name].copy_(weight)
        self._ring.append(copy)

    @torch.no_grad()
    def average(self) -> WeightCopy | None:
        """The average, where copies are kept; None before the first snapshot. The next snapshot makes it invalid."""
        if self._average is None and self._ring:
            self._average = self._ring[0] if self.averaging.kind == "ema" else self._combined()
        return self._average

    def _combined(self) -> WeightCopy:
        shares = self.averaging.coefficients(len(self._ring))
        combined = {}
        for name, newest in self._ring[-1].items():
            total = torch.zeros_like(newest, dtype=torch.float64)
            for copy, share in zip(self._ring, shares, strict=True):
                total.add_(copy[name], alpha=share)
            combined[name] = self._empty(newest).copy_(total)
        return combined

    def copies(self, *, resumable: bool) -> dict[str, WeightCopy]:
        """What a checkpoint holds of the average, by name.

        Args:
            resumable: training may continue from the checkpoint, for which the snapshots are needed.
        """
        average = self.average()
        if average is None:
            return {}
        ring = self._ring if resumable and self.averaging.kind != "ema" else []
        return {AVERAGE: average, **{f"{_SNAPSHOTS}.{number}": copy for number, copy in enumerate(ring)}}

    def record(self, *, resumable: bool) -> dict[str, Any]:
        """The entry `averaging` of the manifest of a checkpoint with `copies`; empty before the first snapshot."""
        if not self.count:
            return {}
        kept = len(self._ring) if resumable and self.averaging.kind != "ema" else 0
        return {**self.averaging.settings, "snapshots": self.steps, "count": self.count, "kept": kept}

    def restore(self, record: Mapping[str, Any], load: Callable[[list[str]], dict[str, dict[str, Tensor]]]) -> None:
        """Continue from a checkpoint of the stage.

        Args:
            record: the entry `averaging` of its manifest.
            load: reads copies from the checkpoint, by name.
        """
        names = [f"{_SNAPSHOTS}.{number}" for number in range(record["kept"])]
        self.steps, self.count = list(record["snapshots"]), int(record["count"])
        if names:
            self._ring = list(load(names).values())
            return
        self._average = load([AVERAGE])[AVERAGE]
        self._ring = [self._average] if self.averaging.kind == "ema" else []


def _move_towards(average: WeightCopy, weights: Mapping[str, Tensor], share: float) -> None:
    """average <- average + share (weights - average), in float64, rounded once."""
    for name, mean in average.items():
        new = weights[name].to(mean.device).double()
        mean.copy_(mean.double().lerp_(new, share))
