"""The state dict of a checkpoint: model weights and optimizer tensors, under torch.distributed.checkpoint (DCP).

DCP names tensors by parameter name and loads any slice of them, so a checkpoint is resharded on load: it can be read
under other parallelism degrees, or in one process. Hyperparameters (betas, weight decay, learning rate) are not stored;
they come from the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from torch.optim import Optimizer

from titan_cpt.checkpoint.storage import ShardReader
from titan_cpt.distributed.float8 import without_float8_wrappers
from titan_cpt.errors import CheckpointError

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def state_to_save(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """This rank's shards of the weights (float8 weights in high precision) and of the optimizer's tensors."""
    return {
        "model": without_float8_wrappers(get_model_state_dict(model)),
        "optimizer": _only_tensors(_optimizer_state(model, optimizer)),
    }


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer | None, *, average: bool = False) -> None:
    """Load a checkpoint into a model and, if given, its optimizer, in place; collective.

    Args:
        average: load the average of the weights into the model, instead of the weights.

    Raises:
        CheckpointError: the folder cannot be read, or its tensors are not those of the model.
    """
    state: dict[str, Any] = {"model": without_float8_wrappers(get_model_state_dict(model))}
    optimizer_state: dict[str, Any] = {}
    if optimizer is not None:
        optimizer_state = _optimizer_state(model, optimizer)
        state["optimizer"] = _only_tensors(optimizer_state)
    reader = ShardReader(folder, average=average)
    try:
        load(state, storage_reader=reader)
    except (Exception, CheckpointException) as error:  # DCP's, which wraps the ranks' errors, is a BaseException
        reason = reason_of_failure(reader.failure or error)
        raise CheckpointError(f"{folder}: cannot be loaded into this model: {reason}") from None
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, {**optimizer_state, **state["optimizer"]}, options=_FLAT)


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
