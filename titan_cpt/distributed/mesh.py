"""Which ranks there are, what they compute on, in which precision, and where each stands in the layout."""

from __future__ import annotations

import itertools
import logging
import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from titan_cpt.layout import Layout, Place

_SECONDS_BETWEEN_LOOKS = 0.2
_waits = itertools.count()  # the same on every rank, as all of them wait in the same places


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank: 0 to world_size - 1.
        device: CUDA where there is one, else the CPU.
    """

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class Mesh:
    """The layout with process groups in it, seen from one rank.

    Attributes:
        place: this rank's coordinates.
        data_rank: its share of every global batch.
        dims: the torch meshes of the model's dimensions: `pp` and `tp` where their degree is above 1, and `fsdp`, over
            which weights are sharded: dp_shard and cp as one, after dp_replicate where there are copies (HSDP). None
            for a single process, which needs no process group.
        context: the ranks that share this rank's sequences; None without context parallelism.
    """

    ranks: Ranks
    layout: Layout
    place: Place
    data_rank: int
    dims: DeviceMesh | None
    context: dist.ProcessGroup | None

    @property
    def fsdp(self) -> DeviceMesh:
        """What FSDP2 shards over; two dimensions, copies first, under HSDP."""
        assert self.dims is not None, "a single process is not sharded"
        return self.dims["dp_replicate", "fsdp"] if self.layout.dp_replicate > 1 else self.dims["fsdp"]

    @property
    def tensor(self) -> DeviceMesh:
        """The ranks among which matrices are split."""
        assert self.dims is not None, "a single process splits no matrix"
        return self.dims["tp"]

    @property
    def pipeline(self) -> dist.ProcessGroup | None:
        """The ranks among which layers are split; None without a pipeline."""
        return self.dims["pp"].get_group() if self.dims is not None and self.layout.pp > 1 else None

    def summed_shares(self, loss: Tensor) -> Tensor:
        """The sum over all ranks of their shares of a loss, in place; tensor-parallel ranks hold the same share."""
        if self.dims is None:
            return loss
        loss *= float(self.place.tensor == 0)
        dist.all_reduce(loss)
        return loss


def join_ranks(timeout_s: int | None = None) -> Ranks:
    """Initialize the process group from torchrun's variables; without them this process is the only one.

    Args:
        timeout_s: longest wait for another process, here and in every collective operation until `set_timeouts`; None
            for torch's own (10 minutes for NCCL, 30 for gloo).
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size == 1:
        return Ranks(0, 1, device)
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
        dist.init_process_group(backend, timeout=timeout)
    return Ranks(dist.get_rank(), world_size, device)


def leave_ranks() -> None:
    """Part from the peers."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def set_timeouts(timeout_s: int) -> None:
    """Set the longest wait of every collective operation of every process group that this process is part of."""
    if not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def wait_for_rank_0() -> None:
    """Return on every rank when rank 0 has come here too, however long that takes; the others do not wait for more.

    Not a barrier, whose timeout would end a run while rank 0 prepares data for hours.
    """
    if not dist.is_initialized():
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"titan_cpt/rank-0/{next(_waits)}"
    if dist.get_rank() == 0:
        store.set(key, "done")
    while not store.check([key]):
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def build_mesh(ranks: Ranks, layout: Layout) -> Mesh:
    """Give every rank its place and make the process groups; collective.

    Args:
        layout: of exactly as many ranks as there are.
    """
    assert layout.world_size == ranks.world_size, f"{layout} is not a layout of {ranks.world_size} ranks"
    # It tells at every step that a norm over two mesh dimensions is reduced one after the other, as is meant here.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    dims = context = None
    if ranks.world_size > 1:
        degrees = {"pp": layout.pp, "dp_replicate": layout.dp_replicate}
        degrees = {name: degree for name, degree in degrees.items() if degree > 1}
        degrees["fsdp"] = layout.dp_shard * layout.cp  # always there: it casts to the precision, even over one rank
        degrees |= {"tp": layout.tp} if layout.tp > 1 else {}
        dims = init_device_mesh(ranks.device.type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
        context = _context_group(ranks.device.type, layout) if layout.cp > 1 else None
    return Mesh(ranks, layout, layout.place(ranks.rank), layout.data_rank(ranks.rank), dims, context)


def _context_group(device: str, layout: Layout) -> dist.ProcessGroup:
    outer = layout.world_size // (layout.cp * layout.tp)
    mesh = init_device_mesh(device, (outer, layout.cp, layout.tp), mesh_dim_names=("others", "cp", "tp"))
    return mesh["cp"].get_group()
