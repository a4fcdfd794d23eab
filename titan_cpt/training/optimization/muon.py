"""Muon for the matrices of the blocks and AdamW for all other parameters, in one optimizer. No host sync.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, as torch.optim.Muon implements it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from titan_cpt.distributed.float8 import local_values
from titan_cpt.planning.plan import MUON_KEYS, MuonHyperparameters, OptimizerHyperparameters
from titan_cpt.training.optimization.adamw import MOMENTUM_BUFFER, allocate_state, uses_muon
from titan_cpt.training.optimization.matrix_exchange import Exchange, MatrixExchange, OneProcess, Round
from titan_cpt.training.optimization.newton_schulz import lr_factor, orthogonalize


def use_optimizer(optimizer: AdamW, given: OptimizerHyperparameters) -> None:
    """Begin to update with a stage's optimizer; call it before that stage's optimizer state is loaded."""
    if isinstance(optimizer, Muon):
        optimizer.use(given.muon)
    else:
        assert given.muon is None, "a run with Muon has the optimizer Muon from its start"


class Muon(AdamW):
    """Muon for the two-dimensional weights of the blocks, AdamW for embeddings, head, and vectors; or AdamW for all.

        B <- momentum B + (1 - momentum) g                 g: the gradient, B: the momentum buffer
        U <- momentum B + (1 - momentum) g                 with Nesterov momentum; otherwise U = B
        p <- p - lr weight_decay p - lr f orthogonalize(U)  f: see `lr_factor`

    On one process weights and momentum are bit for bit those of torch.optim.Muon; with several, given equal gradients,
    those of one process: every element goes through the same operations, and a matrix is orthogonalized whole, by one
    rank (see `MatrixExchange`). `use` changes between Muon and AdamW.

    Args:
        model: parameters named `blocks.*` are those of the blocks; under FSDP, already sharded.
        group: the ranks that hold shards of this rank's parameters; None in a single process.
    """

    found_inf: Tensor
    """float32, 0-dimensional, on the device: unless 0, a step changes nothing. `UpdateGuard` puts its own flag here."""
    selects_on_device: bool
    """Whether the device obeys the flag, as on a GPU, where reading it would wait for the device."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        blocks = [parameter for name, parameter in trained if name.startswith("blocks.") and parameter.ndim == 2]
        kept = {id(parameter) for parameter in blocks}
        others = [parameter for _, parameter in trained if parameter.ndim > 1 and id(parameter) not in kept]
        vectors = [parameter for _, parameter in trained if parameter.ndim <= 1]
        assert blocks, "the model has no matrices in blocks"
        groups: list[dict[str, Any]] = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in ((blocks, weight_decay), (others, weight_decay), (vectors, 0.0))
            if parameters
        ]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self._blocks = kept
        self._group = group
        self._matrices = [(parameter, self.param_groups[0]) for parameter in blocks]
        self._exchange = self._new_exchange(blocks)
        self.found_inf = torch.zeros((), device=blocks[0].device)
        self.selects_on_device = blocks[0].device.type != "cpu"

    def _new_exchange(self, matrices: Sequence[Tensor]) -> Exchange:
        """The exchange of these matrices; with several ranks collective."""
        if not matrices or not isinstance(matrices[0], DTensor):
            return OneProcess(matrices)
        assert self._group is not None, "sharded weights need the group of the ranks that hold them"
        return MatrixExchange(matrices, self._group)

    def is_of_blocks(self, parameter: Tensor) -> bool:
        """Whether Muon can update a parameter: a two-dimensional weight of the blocks."""
        return id(parameter) in self._blocks

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded state; AdamW's method would look for a step count in Muon's."""
        Optimizer.__setstate__(self, state)

    def use(self, muon: MuonHyperparameters | None, *, allocate: bool = True) -> None:
        """Update the blocks' matrices with Muon, or with AdamW if None; collective if the groups were replaced.

        Where that changes, their state is freed and allocated anew, as zeros; no other state changes.
        """
        groups = [group for group in self.param_groups if self.is_of_blocks(group["params"][0])]
        matrices = [(parameter, group) for group in groups for parameter in group["params"]]
        for parameter, group in matrices:
            if (muon is not None) != uses_muon(group):
                self.state.pop(parameter, None)
        for group in groups:
            for key in MUON_KEYS:
                group.pop(key, None)
            if muon is not None:
                group.update({key: getattr(muon, key) for key in MUON_KEYS})
        if [id(parameter) for parameter, _ in matrices] != [id(parameter) for parameter, _ in self._matrices]:
            self._exchange = self._new_exchange([parameter for parameter, _ in matrices])
        self._matrices = matrices
        if allocate:
            allocate_state(self)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all weights, unless `found_inf` is set; with several ranks collective. No host sync."""
        assert closure is None, "closures are not supported"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not uses_muon(group)]
        try:
            super().step()
        finally:
            self.param_groups = groups
        if any(uses_muon(group) for group in groups):
            halted = self.found_inf > 0 if self.selects_on_device else None
            if halted is None and bool(self.found_inf):
                return
            for step in self._exchange.rounds:
                self._update(step, halted)

    def _update(self, step: Round, halted: Tensor | None) -> None:
        """Update the matrices of one round, unless `halted`; None: they are updated."""
        shards = {}
        for index in step.matrices:
            update = self._advance_momentum(*self._matrices[index], halted)
            if self._exchange.is_sent(index):
                shards[index] = update.bfloat16()
        whole = self._exchange.gather(step, shards)
        del shards
        results = {
            index: orthogonalize(whole.pop(index), self._matrices[index][1]["ns_steps"]) for index in list(whole)
        }
        for parts in self._exchange.scatter(step, results):
            for index, part in parts.items():
                parameter, group = self._matrices[index]
                self._apply(parameter, part, group, halted)

    def _advance_momentum(self, parameter: Tensor, group: dict[str, Any], halted: Tensor | None) -> Tensor:
        """Add this rank's part of the gradient to the momentum buffer; returns U of the class's formula."""
        assert parameter.grad is not None, "every matrix of the blocks has a gradient"
        gradient = local_values(parameter.grad)
        momentum = local_values(self.state[parameter][MOMENTUM_BUFFER])
        if halted is None:
            advanced = momentum.lerp_(gradient, 1 - group["momentum"])
        else:
            advanced = momentum.lerp(gradient, 1 - group["momentum"])
            torch.where(halted, momentum, advanced, out=momentum)
        return gradient.lerp(advanced, group["momentum"]) if group["nesterov"] else advanced

    def _apply(self, parameter: Tensor, part: Tensor, group: dict[str, Any], halted: Tensor | None) -> None:
        """Decay this rank's part of a weight and add the update to it."""
        weight = local_values(parameter)
        lr = group["lr"]
        decay = 1 - lr * group["weight_decay"]
        updated = weight.mul_(decay) if halted is None else weight * decay
        updated.add_(part, alpha=-(lr * lr_factor(parameter.shape[0], parameter.shape[1], group["adjust_lr"])))
        if halted is not None:
            torch.where(halted, weight, updated, out=weight)
