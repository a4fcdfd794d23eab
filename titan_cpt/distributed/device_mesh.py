"""Which ranks there are, what they compute on, in which precision, and where each stands in the layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_cpt.distributed.parallel_dims import ParallelDims, RankCoordinates
from titan_cpt.distributed.process_group import ProcessInfo


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

    ranks: ProcessInfo
    layout: ParallelDims
    place: RankCoordinates
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


def build_mesh(ranks: ProcessInfo, layout: ParallelDims) -> Mesh:
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


def _context_group(device: str, layout: ParallelDims) -> dist.ProcessGroup:
    outer = layout.world_size // (layout.cp * layout.tp)
    mesh = init_device_mesh(device, (outer, layout.cp, layout.tp), mesh_dim_names=("others", "cp", "tp"))
    return mesh["cp"].get_group()
