"""Weights in reduced precision beside the float32 ones: what a single process multiplies with, and what it trains.

Several processes need none of this: FSDP2 casts the weights that it gathers, by the same rule and to the same numbers.
"""

from __future__ import annotations

import torch
from torch import nn


class ComputeCopy:
    """Casts the trained weights once a step, however many micro-batches follow, and sums their gradients in float32.

    That weights may have changed is known by their version counters, which a loaded checkpoint and initial weights
    raise, and by gradients that were there and are cleared: the fused optimizer raises no counter. A gradient is cast
    to float32 as it arrives and belongs to both sides, so that nothing is copied back.

    Args:
        trained: the model whose float32 weights the optimizer and the checkpoints hold.
        working: the same model, its weights in another precision; it runs.
    """

    def __init__(self, trained: nn.Module, working: nn.Module) -> None:
        self._trained: list[torch.Tensor]
        self._working: list[torch.Tensor]
        self._trained, self._working = [*trained.parameters()], [*working.parameters()]
        assert [p.shape for p in self._trained] == [p.shape for p in self._working], "two different models"
        self._versions: list[int] = []
        self._gave_gradients = False
        for weight in self._working:
            weight.grad_dtype = torch.float32

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast what is trained if any of it may have changed; to be called before a forward pass."""
        versions = [weight._version for weight in self._trained]
        stepped = self._gave_gradients and all(weight.grad is None for weight in self._trained)
        if stepped or versions != self._versions:
            torch._foreach_copy_(self._working, self._trained)
            self._versions, self._gave_gradients = versions, False

    def take_gradients(self) -> None:
        """Go on from the trained weights' gradients: those summed so far, or none after the optimizer cleared them."""
        for trained, working in zip(self._trained, self._working, strict=True):
            working.grad = trained.grad

    def give_gradients(self) -> None:
        """Let the trained weights have what the backward pass left."""
        for trained, working in zip(self._trained, self._working, strict=True):
            trained.grad = working.grad
        self._gave_gradients = True
