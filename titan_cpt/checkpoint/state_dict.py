"""The state dict of a checkpoint: model weights and optimizer tensors, under torch.distributed.checkpoint (DCP).

DCP names tensors by parameter name and loads any slice of them, so a checkpoint is resharded on load: it can be read
under other parallelism degrees, or in one process. Hyperparameters (betas, weight decay, learning rate) are not stored;
they come from the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from titan_cpt.checkpoint.storage import ShardReader
from titan_cpt.distributed.float8 import local_values, without_float8_wrappers
from titan_cpt.errors import CheckpointError

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


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
        "optimizer": _only_tensors(_optimizer_state(model, optimizer)),
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


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer | None, *, average: bool = False) -> None:
    """Load a checkpoint into a model and, if given, its optimizer, in place; collective.

    Args:
        average: load the average of the weights into the model, instead of the weights.

    Raises:
        CheckpointError: the folder cannot be read, or its tensors are not those of the model.
    """
    state: dict[str, Any] = {"model": master_weights(model)}
    optimizer_state: dict[str, Any] = {}
    if optimizer is not None:
        optimizer_state = _optimizer_state(model, optimizer)
        state["optimizer"] = _only_tensors(optimizer_state)
    _load(folder, state, ShardReader(folder, average=average))
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, {**optimizer_state, **state["optimizer"]}, options=_FLAT)


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


def _optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """This rank's shards of the optimizer state, keyed by parameter name."""
    return get_optimizer_state_dict(model, optimizer, options=_FLAT)


def _only_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Moments and step counts, without hyperparameters such as betas and weight decay."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
