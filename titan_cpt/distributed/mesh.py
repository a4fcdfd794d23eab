"""Which ranks there are, what they compute on, and in which precision."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank: 0 to world_size - 1.
        device: CUDA where there is one, else the CPU.
        mesh: one dimension, `dp`; None for a single process, which needs no process group.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None


def join_ranks() -> Ranks:
    """Take up the place that torchrun's variables give this process; without them it is the only one."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size == 1:
        return Ranks(0, 1, device, None)
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo")
    return Ranks(
        dist.get_rank(), world_size, device, init_device_mesh(device.type, (world_size,), mesh_dim_names=("dp",))
    )


def leave_ranks() -> None:
    """Part from the peers."""
    if dist.is_initialized():
        dist.destroy_process_group()


def autocast(ranks: Ranks, precision: torch.dtype) -> AbstractContextManager[object]:
    """bfloat16 products over float32 weights for a single process; FSDP2 casts by itself when there are several."""
    if precision == torch.float32 or ranks.mesh is not None:
        return nullcontext()
    return torch.autocast(ranks.device.type, dtype=precision)
