"""The weights, and rows of weights, that a stage trains: the optimizer's parameter groups and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from titan_cpt.checkpoint.state_dict import ROWS, parameters_by_name
from titan_cpt.common.weights.partition import WHOLE, Partition
from titan_cpt.distributed.float8 import local_values
from titan_cpt.distributed.parallelize import freeze
from titan_cpt.distributed.weight_rows import WeightRows
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.optimization.adamw import LR_SCALE, allocate_state
from titan_cpt.training.optimization.muon import Muon, use_optimizer


class TrainedWeights:
    """What the optimizer updates in the stage that is trained.

    Rows of a weight are a parameter of their own, without moments for the other rows. Gradients of other rows and of
    frozen weights, as far as the backward pass computes them, do not count in the gradient norm.

    Args:
        model: this rank's float32 weights.
        optimizer: updates them all, until `use`.
        running: the modules whose forward and backward pass run, see `freeze`.
    """

    def __init__(self, model: nn.Module, optimizer: AdamW, running: Sequence[nn.Module] = ()) -> None:
        self.model = model
        self.running = running
        self.optimizer = optimizer
        self.partition: Partition | None = None
        self.is_partial = False
        """Whether some weights or rows are not trained, or rows are a parameter of their own."""
        self._frozen: list[nn.Parameter] = []
        self._by_rows: list[list[WeightRows]] = []  # one list for each weight that is trained by rows

    def use(self, stage: StagePlan) -> None:
        """Begin to train what a stage trains; call it before that stage's optimizer state is loaded.

        Where that changes, the optimizer's groups are replaced, in its own list, and its state begins anew. Frozen
        weights get no gradients.
        """
        if stage.partition != self.partition:
            self.partition = stage.partition
            parts = None if stage.partition is None else stage.partition.parts
            freeze([self.model, *self.running], parts and [name for name in parts if parts[name]])
            self._regroup()
        use_optimizer(self.optimizer, stage.optimizer)
        allocate_state(self.optimizer)

    def _regroup(self) -> None:
        named = parameters_by_name(self.model)
        self._frozen = [weight for name, weight in named.items() if self.partition and not self.partition.parts[name]]
        self._by_rows = []
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, weight in named.items():
            parts = WHOLE if self.partition is None else self.partition.parts[name]
            rows = [WeightRows(name, weight, part.rows) for part in parts if part.rows is not None]
            if rows:
                self._by_rows.append(rows)
            for number, part in enumerate(parts):
                key = (self._kind(name, weight), part.scale, part.rows is not None)
                group = groups.setdefault(key, {**self.optimizer.defaults, "params": []})
                if self.partition is not None:
                    group[LR_SCALE] = part.scale
                if part.rows is not None:
                    group.setdefault(ROWS, []).append(rows[number])
                group["params"].append(rows[number].parameter if part.rows is not None else weight)
        self.optimizer.state.clear()
        self.optimizer.param_groups[:] = [groups[key] for key in sorted(groups, key=lambda key: key[0])]
        self.is_partial = bool(self._frozen or self._by_rows)

    def _kind(self, name: str, weight: Tensor) -> int:
        """The place of a weight's groups: matrices of blocks first, if they can be Muon's; vectors last."""
        if weight.ndim <= 1:
            return 2
        of_blocks = isinstance(self.optimizer, Muon) and self.optimizer.is_of_blocks(weight)
        return 0 if of_blocks else 1

    @torch.no_grad()
    def prepare_gradients(self) -> None:
        """Drop the gradients of what is not trained, and hand those of rows to their parameters; call after backward.

        Gradients of other rows become zero, so that the norm and its sums over ranks are those of trained rows.
        """
        for weight in self._frozen:
            weight.grad = None
        for parts in self._by_rows:
            for untrained in _others(parts):
                untrained.zero_()
            for part in parts:
                part.take_gradient()

    def clear_gradients(self) -> None:
        """Remove all gradients of the model; call after the optimizer has cleared those of its parameters."""
        self.model.zero_grad(set_to_none=True)


def _others(parts: list[WeightRows]) -> Iterator[Tensor]:
    """This rank's part of the gradient in the rows of a weight that are not trained."""
    gradient = parts[0].weight.grad
    if gradient is None:
        return
    local = local_values(gradient)
    yield local[: parts[0].first]
    yield local[parts[-1].stop :]
