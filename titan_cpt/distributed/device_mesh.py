"""The device meshes and process groups of all parallelism dimensions, as one rank sees them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_cpt.distributed.parallel_dims import ParallelDims, RankCoordinates
from titan_cpt.distributed.process_group import ProcessInfo


@dataclass(frozen=True)
class Mesh:
    """Parallelism degrees, and this rank's coordinates, device mesh and process groups.

    Attributes:
        coordinates: this rank's coordinate in every dimension.
        data_rank: index of this rank's share of each global batch.
        device_mesh: dimensions `pp`, `dp_replicate`, `fsdp` (dp_shard and cp flattened into one) and `tp`, in this
            order. `fsdp` always exists, the others only if their degree is above 1. None in a single process.
        context: process group of the ranks that share this rank's sequences; None without context parallelism.
    """

    process: ProcessInfo
    parallel_dims: ParallelDims
    coordinates: RankCoordinates
    data_rank: int
    device_mesh: DeviceMesh | None
    context: dist.ProcessGroup | None

    @property
    def fsdp(self) -> DeviceMesh:
        """The mesh of FSDP2: [fsdp], or [dp_replicate, fsdp] with HSDP."""
        assert self.device_mesh is not None, "a single process is not sharded"
        replicated = self.parallel_dims.dp_replicate > 1
        return self.device_mesh["dp_replicate", "fsdp"] if replicated else self.device_mesh["fsdp"]

    @property
    def tensor(self) -> DeviceMesh:
        """The mesh of tensor parallelism."""
        assert self.device_mesh is not None, "a single process has no tensor parallelism"
        return self.device_mesh["tp"]

    @property
    def pipeline(self) -> dist.ProcessGroup | None:
        """The process group of the ranks that hold this rank's pipeline; None without pipeline parallelism."""
        if self.device_mesh is None or self.parallel_dims.pp == 1:
            return None
        return self.device_mesh["pp"].get_group()

    @property
    def pipeline_peers(self) -> list[list[int]]:
        """For every pipeline coordinate, the ranks that hold shards of the same layers."""
        if self.device_mesh is None:
            return [[0]]
        return cast(list[list[int]], self.device_mesh.mesh.reshape(self.parallel_dims.pp, -1).tolist())

    def sum_loss(self, loss: Tensor) -> Tensor:
        """Sum each rank's share of a loss over all ranks; in place, collective."""
        if self.device_mesh is None:
            return loss
        loss *= float(self.coordinates.tensor == 0)  # tensor-parallel ranks hold identical losses: count each once
        dist.all_reduce(loss)
        return loss


def build_mesh(process: ProcessInfo, parallel_dims: ParallelDims) -> Mesh:
    """Create the device mesh and process groups; collective. The degrees must multiply to the world size."""
    dims = parallel_dims
    assert dims.world_size == process.world_size, (
        f"{dims}: degrees multiply to {dims.world_size}, but the run has {process.world_size} ranks"
    )
    # Silence a warning at each step: torch reduces a norm over two mesh dimensions one after the other.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    device_mesh = context = None
    if process.world_size > 1:
        degrees = {"pp": dims.pp, "dp_replicate": dims.dp_replicate}
        degrees = {name: degree for name, degree in degrees.items() if degree > 1}
        degrees["fsdp"] = dims.dp_shard * dims.cp  # also if its size is 1: FSDP2 does the mixed precision
        degrees |= {"tp": dims.tp} if dims.tp > 1 else {}
        device_mesh = init_device_mesh(process.device.type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
        context = _context_group(process.device.type, dims) if dims.cp > 1 else None
    return Mesh(
        process,
        dims,
        dims.coordinates(process.rank),
        dims.data_rank(process.rank),
        device_mesh=device_mesh,
        context=context,
    )


def _context_group(device: str, dims: ParallelDims) -> dist.ProcessGroup:
    """The process group of this rank's context-parallel ranks."""
    others = dims.world_size // (dims.cp * dims.tp)
    mesh = init_device_mesh(device, (others, dims.cp, dims.tp), mesh_dim_names=("others", "cp", "tp"))
    return mesh["cp"].get_group()
