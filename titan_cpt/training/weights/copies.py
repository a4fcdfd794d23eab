"""Copies of the weights that a stage keeps beside them, on the steps on which they are taken, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titan_cpt.checkpoint.state_dict import WeightCopy, load_copies, local_weights
from titan_cpt.common.run_folder import STAGE_END
from titan_cpt.common.weights.averaging import Averaging
from titan_cpt.common.weights.reptile import Reptile
from titan_cpt.planning.plan import StagePlan
from titan_cpt.training.weights.averager import Averager
from titan_cpt.training.weights.reptile import OldWeights

_ENTRY = "averaging"  # of the manifest


class WeightCopies:
    """The copies of the stage that is trained.

    Args:
        model: this rank's float32 weights.
        changed: called after the weights were exchanged or pulled.
    """

    def __init__(self, model: nn.Module, changed: Callable[[], None]) -> None:
        self._model = model
        self._changed = changed
        self._averager: Averager | None = None
        self._old_weights: OldWeights | None = None

    def begin(self, stage: StagePlan) -> None:
        """Begin a stage, whose initial weights the model has: copies of an earlier one are forgotten."""
        averaging, reptile = stage.averaging, stage.reptile
        self._averager = self._old_weights = None
        if averaging is not None:
            self._averager = Averager(averaging, _empty_on(averaging))
        if reptile is not None:
            frozen = stage.partition is not None
            self._old_weights = OldWeights(reptile, _empty_on(reptile), local_weights(self._model), some_frozen=frozen)

    def resume(self, stage: StagePlan, folder: Path, record: Mapping[str, Any]) -> str | None:
        """Continue a stage from a checkpoint, whose weights the model has; collective.

        Args:
            record: its manifest.

        Returns:
            A note if the average begins anew: the config has changed, or a branch has its snapshots at other steps.
        """
        self.begin(stage)
        if self._old_weights is not None:
            empty = _empty_on(self._old_weights.reptile)
            self._old_weights.restore(
                int(record["steps_done"]), lambda names: load_copies(folder, self._model, names, empty)
            )
        saved = record.get(_ENTRY)
        if self._averager is None or not saved:
            return None
        averaging = self._averager.averaging
        if averaging.settings != {key: saved.get(key) for key in averaging.settings}:
            return "the average of the weights begins anew, because [averaging] has changed"
        if not all(averaging.due(step) for step in saved["snapshots"]):
            return "the average of the weights begins anew: this run takes its snapshots after other steps"
        self._averager.restore(saved, lambda names: load_copies(folder, self._model, names, _empty_on(averaging)))
        return None

    def take(self, stage: StagePlan, steps_done: int) -> None:
        """Pull the weights and take the copies that are due after these steps, whose weights are known to be good."""
        if self._old_weights is not None and self._old_weights.reptile.is_due(steps_done):
            self._old_weights.pull(local_weights(self._model))
            self._changed()
        if self._averager is not None and self._averager.averaging.due(steps_done):
            self._averager.take(local_weights(self._model), steps_done)

    @property
    def has_average(self) -> bool:
        """Whether there is an average: a snapshot was taken in this stage."""
        return self._averager is not None and self._averager.count > 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has its average while the context is open, and its own weights, bit for bit, afterwards."""
        assert self._averager is not None, "call it only if there is an average"
        average = self._averager.average()
        assert average is not None
        weights = local_weights(self._model)
        empty = _empty_on(self._averager.averaging)
        own = {name: empty(weight).copy_(weight) for name, weight in weights.items()}
        try:
            _write(weights, average)
            self._changed()
            yield
        finally:
            _write(weights, own)
            self._changed()

    def to_save(self, kind: str, steps_done: int) -> tuple[dict[str, WeightCopy], dict[str, Any]]:
        """The copies that a checkpoint of this kind holds, by name, and what its manifest says of them."""
        old = {} if self._old_weights is None else self._old_weights.copies(steps_done)
        if self._averager is None or not self.has_average:
            return old, {}
        resumable = kind != STAGE_END
        record = {_ENTRY: self._averager.record(resumable=resumable)}
        return {**old, **self._averager.copies(resumable=resumable)}, record


@torch.no_grad()
def _write(weights: Mapping[str, Tensor], copy: WeightCopy) -> None:
    for name, weight in weights.items():
        weight.copy_(copy[name])


def _empty_on(averaging: Averaging | Reptile) -> Callable[[Tensor], Tensor]:
    """Makes an uninitialized copy of a local weight on the host, pinned if the weight is on a GPU, or on its device."""
    return _empty_on_host if averaging.on_host else partial(torch.empty_like, requires_grad=False)


def _empty_on_host(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, device="cpu", pin_memory=weight.device.type == "cuda")
