"""Agreement between ranks: whether a condition holds on all of them, and loading that fails on all or on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import DataError

T = TypeVar("T")


def on_all_ranks(condition: bool, process: ProcessInfo) -> bool:
    """Whether the condition holds on every rank; collective."""
    if process.world_size == 1:
        return condition
    lacking = torch.tensor(int(not condition))
    dist.all_reduce(lacking, op=dist.ReduceOp.MAX)
    return not lacking.item()


def load_on_all_ranks(load: Callable[[], T], process: ProcessInfo) -> T:
    """Call `load` on every rank; collective.

    Raises:
        DataError: `load` raised it on any rank. It is then raised on every rank, so that none waits for another.
    """
    failure: DataError | None = None
    try:
        loaded = load()
    except DataError as error:
        failure = error
    if process.world_size > 1:
        failed = torch.tensor(int(failure is not None))
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed.item() and failure is None:
            failure = DataError("another rank could not load the dataset of a task")
    if failure is not None:
        raise failure
    return loaded
