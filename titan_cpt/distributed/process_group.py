"""The processes of a run: rank and device, initializing and destroying the process group, barriers, shared errors."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from titan_cpt import errors
from titan_cpt.common.signals import StopRequest
from titan_cpt.errors import PlanError, TitanError

_waits = itertools.count()  # the same on every rank, as all of them wait in the same places


_SECONDS_BETWEEN_LOOKS = (0.1, 2.0)  # grows, so that thousands of ranks leave the store in peace while data is prepared


_LONGEST_WAIT_FOR_READERS_S = 10.0


@dataclass(frozen=True)
class ProcessInfo:
    """This process among its peers.

    Attributes:
        rank: 0 to world_size - 1.
        device: CUDA where there is one, else the CPU.
    """

    rank: int
    world_size: int
    device: torch.device


def init_process_group(timeout_s: int | None = None) -> ProcessInfo:
    """Initialize the process group from torchrun's variables; without them this process is the only one.

    Args:
        timeout_s: longest wait for another process, here and in every collective operation until `set_timeouts`; None
            for torch's own (10 minutes for NCCL, 30 for gloo).
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        _take_device(device)
    if world_size == 1:
        return ProcessInfo(0, 1, device)
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun (2.13) starts ranks again on the store of those that died, where their addresses still stand: the new
        # ones would call the dead. run_train.sh asks it for a new store, which helps with several nodes too.
        store, rank, _ = next(rendezvous("env://"))
        store = PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise PlanError(
                f"port {os.environ.get('MASTER_PORT')} of {socket.gethostname()} is in use by another program, perhaps "
                "a run that has not ended. Choose a free port with MASTER_PORT"
            ) from None
    return ProcessInfo(dist.get_rank(), world_size, device)


def _take_device(device: torch.device) -> None:
    count = torch.cuda.device_count()
    where = f"local rank {device.index} on {socket.gethostname()}"
    if device.index is not None and device.index >= count:
        raise PlanError(
            f"{where}: takes GPU {device.index}, and this node has {count} for the run (0 to {count - 1}): each "
            f"process takes one. Start with NPROC={count}, or give the job more GPUs (CUDA_VISIBLE_DEVICES, "
            "--gpus-per-node)"
        )
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise PlanError(f"{where}: GPU {device.index} cannot be used: {reason}. `nvidia-smi` shows its state") from None


def destroy_process_group() -> None:
    """Part from the peers."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Return when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def set_timeouts(timeout_s: int) -> None:
    """Set the longest wait of every collective operation of every process group that this process is part of."""
    if not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def wait_for_rank_0(failure: TitanError | None = None) -> None:
    """Return on every rank when rank 0 has come here too, however long that takes; the others do not wait for more.

    Not a barrier, whose timeout would end a run while rank 0 prepares data for hours.

    Args:
        failure: why rank 0 cannot continue.

    Raises:
        TitanError: that failure, on every rank.
    """
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"titan_cpt/rank-0/{next(_waits)}"
    if dist.get_rank() == 0:
        store.set(key, "" if failure is None else json.dumps([type(failure).__name__, str(failure)]))
    pause, longest_pause = _SECONDS_BETWEEN_LOOKS
    while not store.check([key]):
        time.sleep(pause)
        pause = min(1.2 * pause, longest_pause)
    told = store.get(key).decode()
    if told:
        _wait_until_read(store, key)
        name, message = json.loads(told)
        error: TitanError = getattr(errors, name)(message)
        error.on_every_rank = True
        raise error
    if failure is not None:
        raise failure  # of a rank that is not 0


def _wait_until_read(store: Store, key: str) -> None:
    """Rank 0, which may hold the store, stays until the others know why nothing starts."""
    store.add(f"{key}/read", 1)
    until = time.monotonic() + _LONGEST_WAIT_FOR_READERS_S
    while dist.get_rank() == 0 and store.add(f"{key}/read", 0) < dist.get_world_size() and time.monotonic() < until:
        time.sleep(0.05)


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 works within the block while the others wait at its end; its TitanError is raised on every rank."""
    failure = None
    try:
        yield
    except TitanError as error:
        failure = error
    wait_for_rank_0(failure)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """A TitanError that some ranks raise within the block is raised by every rank at its end; collective.

    Nothing within the block may be collective unless every rank does all of it: the others would wait for the one that
    failed. The message holds each fault once, rank 0's first.
    """
    failure: TitanError | None = None
    try:
        yield
    except TitanError as error:
        failure = error
    failures = [failure]
    if dist.is_initialized():
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
    ranks: dict[str, list[int]] = {}
    for rank, one in enumerate(failures):
        if one is not None:
            ranks.setdefault(str(one), []).append(rank)
    if ranks:
        lines = [text if 0 in where else f"rank {where[0]}: {text}" for text, where in ranks.items()]
        joint = type(next(filter(None, failures)))("\n".join(lines))
        joint.on_every_rank = True
        raise joint


def any_rank_stops(stop: StopRequest) -> bool:
    """Whether any rank received a signal to stop; collective, the same answer on every rank."""
    if not dist.is_initialized():
        return bool(stop.name)
    requested = torch.tensor(int(bool(stop.name)))
    dist.all_reduce(requested, op=dist.ReduceOp.MAX)
    stops = bool(requested.item())  # and not the name, which a signal may have set since: other ranks do not know of it
    if stops and not stop.name:
        stop.name = "a signal to another rank"
    return stops
