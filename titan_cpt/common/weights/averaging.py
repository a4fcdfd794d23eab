"""Which snapshots of the weights an average is made of, and how much each of them counts. No torch.

With updates u_i = s_i - s_(i-1) between the m newest snapshots s_1 .. s_m of weights trained at a constant LR, and s_0
the weights before them,

    s_0 + sum_i w_i u_i  =  sum_j c_j s_j,    c_j = w_j - w_(j+1),  w_(m+1) = 0,

are the weights that the same updates give when the i-th is scaled by w_i. With w_i = f((i - 1) / m), f falling from 1
to 0, the average imitates an LR decay of the shape f; w_1 = 1, so that s_0 does not count and the c_j add up to 1. The
updates themselves would have been others under a lower LR: the average imitates the decay, it does not reproduce it.

Source: Tian et al. 2025, arXiv:2507.17634 (WSM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

Kind = Literal["mean", "ema", "like_decay"]
Shape = Literal["linear", "sqrt", "cosine"]

KINDS: Mapping[str, str] = {
    "mean": "mean",
    "ema": "exponential moving average",
    "like_decay": "mean weighted like an LR decay",
}
"""The kinds in words."""

_SHAPES: Mapping[Shape, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@dataclass(frozen=True)
class Averaging:
    """The average of a stage's weights.

    Attributes:
        kind: mean of the snapshots, their exponential moving average (EMA), or an imitation of an LR decay.
        shape: of the decay that like_decay imitates.
        size: K, the number of snapshots of a full window.
        every: steps between snapshots.
        phase: a snapshot is taken after a number of steps that leaves this remainder when divided by `every`.
        on_host: copies are kept in host memory, not on the device.
    """

    kind: Kind
    shape: Shape
    size: int
    every: int
    phase: int
    on_host: bool = True

    @property
    def stored(self) -> int:
        """Number of float32 copies of the weights that the snapshots need."""
        return 1 if self.kind == "ema" else self.size

    @property
    def in_memory(self) -> int:
        """Number of float32 copies of the weights during a validation of the average.

        The snapshots, the average (an EMA is its own), and the weights that it takes the place of.
        """
        return self.stored + (1 if self.kind == "ema" else 2)

    def saved(self, *, resumable: bool) -> int:
        """Number of copies that a checkpoint holds: the average, and the snapshots if training may resume from it."""
        return 1 + (self.stored if resumable and self.kind != "ema" else 0)

    def due(self, steps_done: int) -> bool:
        """Whether a snapshot is taken after this many steps of the stage."""
        return steps_done > 0 and steps_done % self.every == self.phase

    def coefficients(self, count: int) -> list[float]:
        """How much each of the `count` newest snapshots counts, oldest first; the sum is 1.

        Not for an EMA, whose snapshots are not kept: see `ema_share`.
        """
        if self.kind == "mean":
            return [1 / count] * count
        decay = _SHAPES[self.shape]
        weights = [decay(i / count) for i in range(count)] + [0.0]
        return [here - after for here, after in pairwise(weights)]

    def ema_share(self, number: int) -> float:
        """The share with which the `number`-th snapshot of the stage (from 1) enters an EMA.

        1 / number while the window is not full, so that the average is a plain mean and the first snapshot has no
        more influence than the others; then 1 / K.
        """
        return 1 / min(number, self.size)

    @property
    def description(self) -> str:
        """The kind in words, with its shape."""
        return KINDS[self.kind] + (f" ({self.shape})" if self.kind == "like_decay" else "")

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the average of given weights, for manifests and recipes."""
        shape = {"shape": self.shape} if self.kind == "like_decay" else {}
        return {"kind": self.kind, **shape, "size": self.size, "every": self.every}
