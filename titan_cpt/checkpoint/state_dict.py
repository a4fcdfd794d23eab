"""The state dict of a checkpoint: model weights and optimizer tensors, under torch.distributed.checkpoint (DCP).

DCP names tensors by parameter name and loads any slice of them, so a checkpoint is resharded on load: it can be read
under other parallelism degrees, or in one process. Hyperparameters (betas, weight decay, learning rate) are not stored;
they come from the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from titan_cpt.checkpoint.storage import ShardReader
from titan_cpt.distributed.float8 import local_values, without_float8_wrappers
from titan_cpt.distributed.parallelize import plain_name
from titan_cpt.distributed.weight_rows import WeightRows
from titan_cpt.errors import CheckpointError

ROWS = "rows"
"""Key of a parameter group whose parameters are rows of weights: their `WeightRows`, in the same order."""


WeightCopy: TypeAlias = Mapping[str, Tensor]
"""A copy of this rank's shards of the weights: parameter name -> float32 tensor, on the host or the device."""


def master_weights(model: nn.Module) -> dict[str, Tensor]:
    """This rank's shards of the float32 weights, by parameter name, in the model's own memory.

    Tensors, or DTensors where the model is sharded; without torchao's wrappers.
    """
    return without_float8_wrappers(get_model_state_dict(model))


def local_weights(model: nn.Module) -> dict[str, Tensor]:
    """`master_weights` as plain tensors, in the model's own memory: writing to them changes the model."""
    return {name: local_values(weight) for name, weight in master_weights(model).items()}


def state_to_save(
    model: nn.Module, optimizer: Optimizer, copies: Mapping[str, WeightCopy] | None = None
) -> dict[str, Any]:
    """This rank's shards of the weights (float8 weights in high precision) and of the optimizer's tensors.

    Args:
        copies: name -> copy of the weights that the checkpoint holds too, under `<name>.<parameter name>`.
    """
    weights = master_weights(model)
    return {
        "model": weights,
        "optimizer": optimizer_tensors(model, optimizer),
        **{name: _sharded_like(weights, copy) for name, copy in (copies or {}).items()},
    }


def load_copies(
    folder: Path, model: nn.Module, names: Sequence[str], empty: Callable[[Tensor], Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Read copies of the weights from a checkpoint, under any parallelism degrees; collective.

    Args:
        names: of the copies, as `state_to_save` was given them.
        empty: makes an uninitialized copy of a local weight, on the host or the device.

    Returns:
        This rank's shards of each copy.

    Raises:
        CheckpointError: the folder cannot be read, or lacks one of the copies.
    """
    weights = master_weights(model)
    copies = {name: {each: empty(local_values(weight)) for each, weight in weights.items()} for name in names}
    state: dict[str, Any] = {name: _sharded_like(weights, copy) for name, copy in copies.items()}
    _load(folder, state, ShardReader(folder))
    return copies


def load_state(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    average: bool = False,
    without_state: Collection[str] = (),
    without: Collection[str] = (),
) -> None:
    """Load a checkpoint into a model and, if given, its optimizer, in place; collective.

    Args:
        average: load the average of the weights into the model, instead of the weights.
        without_state: names of weights whose optimizer state stays as it is.
        without: weights that the model keeps as it has them.

    Raises:
        CheckpointError: the folder cannot be read, or its tensors are not those of the model.
    """
    weights = master_weights(model)
    state: dict[str, Any] = {"model": {name: weight for name, weight in weights.items() if name not in without}}
    if optimizer is not None:
        state["optimizer"] = optimizer_tensors(model, optimizer, without=without_state)
    _load(folder, state, ShardReader(folder, average=average))
    set_model_state_dict(model, {**weights, **state["model"]})
    if optimizer is not None:
        _set_rows(optimizer, state["optimizer"])


def _load(folder: Path, state: dict[str, Any], reader: ShardReader) -> None:
    """Read tensors in place; any fault becomes a CheckpointError."""
    try:
        load(state, storage_reader=reader)
    except (Exception, CheckpointException) as error:  # DCP's, which wraps the ranks' errors, is a BaseException
        reason = reason_of_failure(reader.failure or error)
        raise CheckpointError(f"{folder}: cannot be loaded into this model: {reason}") from None


def _sharded_like(weights: Mapping[str, Tensor], copy: WeightCopy) -> dict[str, Tensor]:
    """A copy with the sharding of the weights. Its tensors may be in host memory where the weights are on a device."""
    return {name: _with_spec(weights[name], local) for name, local in copy.items()}


def _with_spec(weight: Tensor, local: Tensor) -> Tensor:
    # DTensor.from_local would move the tensor to the device of the mesh.
    if not isinstance(weight, DTensor):
        return local
    return DTensor(local, weight._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def reason_of_failure(error: BaseException) -> str:
    """The first rank's error message, without the tracebacks of all ranks that DCP adds to it."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).rstrip(".")


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """This rank's parameters, by their name in the whole model; without the names that wrappers of modules add."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer, *, without: Collection[str] = ()) -> dict[str, Tensor]:
    """This rank's shards of moments and step counts, by `state.<parameter name>.<name of the tensor>`.

    They are the optimizer's own tensors, except those of rows of a weight: they have the whole weight's shape, with
    zeros in the other rows, in host memory, so that a checkpoint does not depend on how rows are sharded.

    Args:
        without: names of weights whose tensors are not included.
    """
    names = {id(parameter): name for name, parameter in parameters_by_name(model).items()}
    rows = {id(part.parameter): part for part in _all_rows(optimizer)}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        part = rows.get(id(parameter))
        name = names[id(parameter)] if part is None else part.name
        for key, value in state.items() if name not in without else ():
            whole = f"state.{name}.{key}"
            if part is not None and value.ndim:
                tensors.setdefault(whole, part.empty_weight())
                part.of(local_values(tensors[whole])).copy_(value)
            else:
                tensors[whole] = value
    return tensors


@torch.no_grad()
def _set_rows(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy the state of rows from tensors with the shape of the whole weight, as `optimizer_tensors` makes them."""
    for part in _all_rows(optimizer):
        for key, value in optimizer.state[part.parameter].items():
            whole = tensors.get(f"state.{part.name}.{key}")
            if whole is not None:
                value.copy_(part.of(local_values(whole)) if value.ndim else whole)


def _all_rows(optimizer: Optimizer) -> list[WeightRows]:
    return [part for group in optimizer.param_groups for part in group.get(ROWS, ())]
