"""bfloat16 compute copy of float32 master weights, for a single process.

With several processes FSDP2 casts the weights that it all-gathers, with the same results.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn


class ComputeCopy:
    """Casts the master weights once per step, and accumulates gradients in float32.

    `refresh` detects new master weights in two ways. Initialization and loading a checkpoint increase the tensors'
    version counters. The fused optimizer does not, but the gradients are cleared after its step. autograd casts each
    gradient to float32, and both models share the gradient tensors, so nothing is copied back. An optimizer that
    writes the compute copy itself is announced by `leave_to_optimizer`.

    Args:
        master: the model whose float32 weights the optimizer updates and checkpoints save.
        compute: the same model in the compute dtype; forward and backward run in it.
    """

    def __init__(self, master: nn.Module, compute: nn.Module) -> None:
        self._master: list[torch.Tensor] = [*master.parameters()]
        self._compute: list[torch.Tensor] = [*compute.parameters()]
        assert [p.shape for p in self._master] == [p.shape for p in self._compute], (
            "master and compute are two different models"
        )
        self._versions: list[int] = []
        self._with_gradients: list[int] = []  # positions of the weights that the next optimizer step changes
        self._written_by_optimizer = False
        for weight in self._compute:
            weight.grad_dtype = torch.float32

    def leave_to_optimizer(self, *, accumulates: bool, float32: Collection[Tensor]) -> dict[Tensor, Tensor]:
        """Let the optimizer write the compute copy in its step, and read gradients as the backward pass makes them.

        Args:
            accumulates: gradients of several micro-batches are summed, so all of them stay in float32.
            float32: weights of the compute model whose gradients stay in float32 in any case: their backward pass
                computes them in float32, or sums several in the compute dtype otherwise.

        Returns:
            Master weight -> compute copy, which the optimizer must write whenever it changes the weight.
        """
        self._written_by_optimizer = True
        kept = {id(weight) for weight in float32}
        for master, compute in zip(self._master, self._compute, strict=True):
            if not accumulates and id(compute) not in kept:
                master.grad_dtype = compute.grad_dtype = compute.dtype
        return dict(zip(self._master, self._compute, strict=True))

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the master weights that may have changed; call before a forward pass."""
        versions = [weight._version for weight in self._master]
        stepped = [] if self._written_by_optimizer else self._with_gradients
        if any(weight.grad is not None for weight in self._master):
            stepped = []  # the optimizer's step is still to come
        if versions != self._versions:
            torch._foreach_copy_(self._compute, self._master)
        elif stepped:
            torch._foreach_copy_([self._compute[n] for n in stepped], [self._master[n] for n in stepped])
        else:
            return
        self._versions = versions
        self._with_gradients = []

    def note_update(self) -> None:
        """Cast in the next `refresh`; call after an update without a backward pass in Python: a replayed CUDA graph."""
        self._with_gradients = [*range(len(self._master))]

    def take_gradients(self) -> None:
        """Share the master weights' gradients with the compute copy, which adds to them; call before backward."""
        for master, compute in zip(self._master, self._compute, strict=True):
            compute.grad = master.grad

    def give_gradients(self) -> None:
        """Hand the compute copy's gradients to the master weights; call after a backward pass.

        The compute copy keeps none: torch.compile refuses to trace a bf16 weight that has a float32 gradient.
        """
        for master, compute in zip(self._master, self._compute, strict=True):
            master.grad = compute.grad
            compute.grad = None
        self._with_gradients = [n for n, master in enumerate(self._master) if master.grad is not None]
