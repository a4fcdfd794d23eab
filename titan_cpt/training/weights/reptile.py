"""Reptile: weights are pulled back towards those of before, after every `every` steps of a stage.

    theta <- old + step * (theta - old)
    old   <- theta

`old` are the weights after the last pull; at first the stage's initial ones. Moments and step counts of the optimizer
stay.

Source: Abbes et al. 2025, arXiv:2508.01908, with every = 500 and step = 0.1; after Nichol et al. 2018,
arXiv:1803.02999.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from titan_cpt.checkpoint.state_dict import WeightCopy
from titan_cpt.common.weights.reptile import Reptile

_OLD = "reptile"  # name of the copy in a checkpoint


class OldWeights:
    """The old weights of one stage, a copy of this rank's shards.

    Args:
        reptile: when weights are pulled, and how far.
        empty: makes an uninitialized copy of a local weight, where the old weights are kept.
        weights: this rank's shards of the stage's initial weights, by parameter name.
        some_frozen: some of them, or rows of them, are not trained.
    """

    def __init__(
        self,
        reptile: Reptile,
        empty: Callable[[Tensor], Tensor],
        weights: Mapping[str, Tensor],
        *,
        some_frozen: bool = False,
    ) -> None:
        self.reptile = reptile
        self._some_frozen = some_frozen
        self._old = {name: empty(weight).copy_(weight) for name, weight in weights.items()}

    @torch.no_grad()
    def pull(self, weights: Mapping[str, Tensor]) -> None:
        """Pull the weights, in place, and make them the old ones.

        Element by element, with one rounding to float32 after each of the three operations: the result does not depend
        on how the weights are sharded.
        """
        for name, weight in weights.items():
            before = self._old[name].to(weight.device)
            pulled = (weight - before).mul_(self.reptile.step).add_(before)
            # A frozen weight that is -0.0 stays that: the sum would be 0.0.
            weight.copy_(torch.where(weight == before, weight, pulled) if self._some_frozen else pulled)
            self._old[name].copy_(weight)

    def copies(self, steps_done: int) -> dict[str, WeightCopy]:
        """What a checkpoint after these steps holds, by name; nothing after a pull: the weights are the old ones."""
        return {} if self._are_the_weights(steps_done) else {_OLD: self._old}

    def restore(self, steps_done: int, load: Callable[[list[str]], dict[str, dict[str, Tensor]]]) -> None:
        """Continue from a checkpoint after these steps, whose weights are those that the object was made with.

        Args:
            load: reads copies from the checkpoint, by name.
        """
        if not self._are_the_weights(steps_done):
            self._old = load([_OLD])[_OLD]

    def _are_the_weights(self, steps_done: int) -> bool:
        return steps_done % self.reptile.every == 0
