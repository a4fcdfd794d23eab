"""The processes of a run: rank and device, the process group, barriers, and errors that all ranks raise together."""

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

_initializations = itertools.count()  # process groups that this process has initialized
_waits = itertools.count()  # numbers the calls of wait_for_rank_0, which every rank makes in the same order
# First and longest interval; it grows, so that thousands of ranks do not overload the store.
_POLL_INTERVAL_S = (0.1, 2.0)
_LONGEST_WAIT_FOR_READERS_S = 10.0
_reports = itertools.count()  # numbers the calls of first_failure
_LONGEST_WAIT_AFTER_FAILURE_S = 60.0


@dataclass(frozen=True)
class ProcessInfo:
    """Rank and device of this process.

    Attributes:
        rank: 0 to world_size - 1; 0 in a single process.
        world_size: number of processes of the run.
        device: the GPU of this process, or the CPU if CUDA is not available.
    """

    rank: int
    world_size: int
    device: torch.device


def init_process_group(timeout_s: int | None = None) -> ProcessInfo:
    """Select this process's device, and initialize the process group from torchrun's environment variables.

    Without these variables, or with WORLD_SIZE=1, the run is a single process and has no process group.

    Args:
        timeout_s: longest wait for other processes, here and in every collective until `set_timeouts` is called; None
            for torch's default (10 minutes for NCCL, 30 for gloo).

    Raises:
        PlanError: a variable is missing or not a number, this node has fewer GPUs than processes, the GPU of this local
            rank cannot be used, or MASTER_PORT is in use.
    """
    world_size = _count_from_environment("WORLD_SIZE", default="1", least=1)
    local_rank = _count_from_environment("LOCAL_RANK", default="0", least=0)
    # All processes of the node raise: those that have a GPU would wait for the others. A launcher other than torchrun
    # may not tell how many there are.
    require_gpus(max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local_rank + 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        _take_device(device)
    if world_size == 1:
        return ProcessInfo(0, 1, device)
    _require_torchrun_variables(world_size)
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    restarted = attempt != "0" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    earlier = next(_initializations)
    if restarted or earlier:
        # torchrun's store still holds the addresses of the processes before a restart (2.13), and of the group that
        # these processes had before, so use another prefix. After a restart run_train.sh requests a new store instead,
        # which also works on several nodes.
        store, rank, _ = next(rendezvous("env://"))
        store = PrefixStore(f"attempt-{attempt if restarted else 0}-group-{earlier}", store)
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


def _count_from_environment(name: str, *, default: str | None, least: int) -> int:
    """A whole number from an environment variable.

    Raises:
        PlanError: the variable is not set and has no default, or is no number of at least `least`.
    """
    text = os.environ.get(name, default)
    if text is None or not text.isdecimal() or int(text) < least:
        found = "is not set" if text is None else f"must be a whole number from {least}, got {text!r}"
        raise PlanError(
            f"the environment variable {name} {found}. torchrun sets it: start several processes with run_train.sh "
            "(NPROC=2) or torchrun; for one process unset RANK, WORLD_SIZE and LOCAL_RANK"
        )
    return int(text)


def _require_torchrun_variables(world_size: int) -> None:
    """Check what torch reads from the environment before it connects to the other processes.

    Raises:
        PlanError: the rank, the address or the port of rank 0 is missing or wrong.
    """
    rank = _count_from_environment("RANK", default=None, least=0)
    if rank >= world_size:
        raise PlanError(f"the environment variable RANK must be below WORLD_SIZE = {world_size}, got {rank}")
    port = _count_from_environment("MASTER_PORT", default=None, least=1)
    if port > 65535:
        raise PlanError(f"the environment variable MASTER_PORT must be a port from 1 to 65535, got {port}")
    if not os.environ.get("MASTER_ADDR"):
        raise PlanError("the environment variable MASTER_ADDR is not set: give it the host name of rank 0")


def single_process() -> ProcessInfo:
    """This process by itself, whatever group it is in; its device is GPU number LOCAL_RANK, or the CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    return ProcessInfo(0, 1, device)


def existing_process_group() -> ProcessInfo:
    """Rank and device of this process in a process group that the caller has initialized.

    The device is GPU number LOCAL_RANK, or rank modulo the number of GPUs if that is not set.

    Raises:
        PlanError: the group has no backend for tensors of the CPU, or the GPU cannot be used.
    """
    backend = str(dist.get_backend_config())
    if "cpu:" not in backend:
        raise PlanError(
            f"the process group has the backend {backend!r}, and training also sends tensors of the CPU: initialize it "
            'with torch.distributed.init_process_group("cuda:nccl,cpu:gloo")'
        )
    rank, device = dist.get_rank(), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        _take_device(device)
    return ProcessInfo(rank, dist.get_world_size(), device)


def require_gpus(processes: int) -> None:
    """Check that this node has a GPU for each of its processes; without any GPU, the processes train on the CPU.

    torch counts the GPUs that CUDA_VISIBLE_DEVICES allows, given as numbers, UUIDs or MIG devices.

    Raises:
        PlanError: this node has GPUs, but fewer than processes.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else processes
    if found < processes:
        raise PlanError(
            f"{processes} processes on {socket.gethostname()}, which has {found} GPU{'s' if found > 1 else ''} for "
            f"them: each process needs one. Start with NPROC={found} (torchrun: --nproc-per-node={found}), or give the "
            "job more GPUs (CUDA_VISIBLE_DEVICES, --gpus-per-node)"
        )


def _take_device(device: torch.device) -> None:
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        where = f"local rank {device.index} on {socket.gethostname()}"
        raise PlanError(f"{where}: GPU {device.index} cannot be used: {reason}. `nvidia-smi` shows its state") from None


def destroy_process_group() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank has called this; does nothing in a single process."""
    if dist.is_initialized():
        dist.barrier()


def set_timeouts(timeout_s: int) -> None:
    """Set the timeout of collectives in every process group of this process; does nothing in a single process."""
    if not dist.is_initialized():
        return
    # torch 2.15 has a public function, and warns at each use of the one that earlier versions have.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(dist.distributed_c10d._world.pg_map):
        set_timeout(timedelta(seconds=timeout_s), group)


def wait_for_rank_0(failure: TitanError | None = None) -> None:
    """Wait, without a timeout, until rank 0 calls this; every rank must call it.

    Rank 0 does not wait, except up to 10 seconds for the other ranks to read its failure. A barrier would time out
    while rank 0 prepares data for hours.

    Args:
        failure: an error of this rank, or None. Rank 0's is raised on every rank, another rank's on that rank only.

    Raises:
        TitanError: rank 0's failure, or this rank's own.
    """
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"titan_cpt/rank-0/{next(_waits)}"
    if dist.get_rank() == 0:
        store.set(key, "" if failure is None else json.dumps([type(failure).__name__, str(failure)]))
    pause, longest_pause = _POLL_INTERVAL_S
    while not store.check([key]):
        time.sleep(pause)
        pause = min(1.2 * pause, longest_pause)
    failure_json = store.get(key).decode()
    if failure_json:
        _wait_until_read(store, key)
        name, message = json.loads(failure_json)
        error: TitanError = getattr(errors, name)(message)
        error.on_every_rank = True
        raise error
    if failure is not None:
        raise failure  # this rank is not rank 0


def _wait_until_read(store: Store, key: str) -> None:
    """Wait on rank 0, whose process may serve the store, until the other ranks have read the failure."""
    store.add(f"{key}/read", 1)
    until = time.monotonic() + _LONGEST_WAIT_FOR_READERS_S
    while dist.get_rank() == 0 and store.add(f"{key}/read", 0) < dist.get_world_size() and time.monotonic() < until:
        time.sleep(0.05)


@contextmanager
def rank_0_first() -> Iterator[None]:
    """At the end of the block, wait for rank 0; a TitanError of rank 0 is raised on every rank."""
    failure = None
    try:
        yield
    except TitanError as error:
        failure = error
    wait_for_rank_0(failure)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """If any rank raises a TitanError in the block, raise one on every rank at the end of the block; collective.

    The block must not contain a collective that a failing rank would skip: the other ranks would wait for it. The
    message combines the messages of all ranks, each distinct one once, rank 0's first.
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


def first_failure(failure: str, *, timeout_s: float) -> str:
    """A failure of any rank, with its rank, or "" if all succeeded; collective, with the same result on every rank.

    Ranks agree through the store: a rank that failed may have left a collective operation in which others still wait.

    Args:
        failure: what failed on this rank; "" for nothing.
        timeout_s: the longest wait for other ranks, and the timeout of collective operations. After a failure the wait
            ends before these time out: after half of it, at most 60 seconds.

    Raises:
        PlanError: other ranks did not come here in that time; they wait for a rank that failed.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return failure
    store = dist.distributed_c10d._get_default_store()
    key = f"titan_cpt/report/{next(_reports)}"
    if failure and store.add(f"{key}/failed", 1) == 1:
        store.set(f"{key}/why", f"rank {dist.get_rank()}: {failure}")
    store.add(f"{key}/here", 1)
    until = time.monotonic() + (min(timeout_s / 2, _LONGEST_WAIT_AFTER_FAILURE_S) if failure else timeout_s)
    pause = 0.002
    while store.add(f"{key}/here", 0) < dist.get_world_size() or store.add(f"{key}/late", 0):
        if time.monotonic() > until or store.add(f"{key}/late", 0):
            store.add(f"{key}/late", 1)  # the others need not wait either
            why = store.get(f"{key}/why").decode() if store.add(f"{key}/failed", 0) else "no rank failed"
            raise PlanError(f"{why}; other ranks wait in a collective operation or need too long")
        time.sleep(pause)
        pause = min(1.2 * pause, _POLL_INTERVAL_S[1])
    return store.get(f"{key}/why").decode() if store.add(f"{key}/failed", 0) else ""


def any_rank_stops(stop: StopRequest) -> bool:
    """Whether any rank received a stop signal; collective, with the same result on every rank."""
    if not dist.is_initialized():
        return bool(stop.name)
    requested = torch.tensor(int(bool(stop.name)))
    dist.all_reduce(requested, op=dist.ReduceOp.MAX)
    stops = bool(requested.item())  # not stop.name: a signal may have set it since the all-reduce
    if stops and not stop.name:
        stop.name = "a signal to another rank"
    return stops
