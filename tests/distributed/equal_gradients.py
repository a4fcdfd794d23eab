"""Muon under a layout of several ranks, given the gradients that one process has: weights and momentum to compare."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_cpt.planning.plan import MuonHyperparameters
from titan_cpt.train import Trainer
from titan_cpt.training.optimization import matrix_exchange
from titan_cpt.training.optimization.muon import Muon
from titan_cpt.training.optimization.update import set_lr
from titan_cpt.training.stage_start import begin_stage

MUON = MuonHyperparameters(momentum=0.95, nesterov=True, ns_steps=5, adjust_lr="match_rms_adamw")
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 3
SHAPES = {"square": (8, 8), "odd": (7, 5), "tall": (33, 10), "wide": (6, 41), "row": (1, 9), "column": (9, 1)}


def whole_gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """The gradient of a parameter in a step, whole, whatever the layout."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    return torch.randn(shape, generator=generator)


def give_gradients(model: nn.Module, step: int) -> None:
    """Set every parameter's gradient, of which a rank has its shard."""
    for name, parameter in model.named_parameters():
        whole = whole_gradient(name, parameter.shape, step)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
            for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
                whole = whole.narrow(dim, offset, size)
            whole = DTensor.from_local(
                whole.contiguous(), mesh, placements, shape=parameter.shape, stride=parameter.stride()
            )
        parameter.grad = whole


def take_steps(trainer: Trainer) -> None:
    """Begin the first stage and take some steps with these gradients."""
    begin_stage(trainer, trainer.plan.stages[0])
    for step in range(STEPS):
        give_gradients(trainer.model, step)
        set_lr(trainer.optimizer, 1e-2 / (1 + step))
        trainer.optimizer.step()


class Matrices(nn.Module):
    """A block of matrices of all kinds of shapes, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ParameterDict(
            {
                name: nn.Parameter(whole_gradient(f"initial {name}", torch.Size(shape), 0))
                for name, shape in SHAPES.items()
            }
        )
        self.embedding = nn.Parameter(whole_gradient("EMBEDDING", torch.Size((5, 3)), 0))

    def trained(self) -> Matrices:
        """These after some steps, on all ranks if they are sharded."""
        group = dist.group.WORLD if isinstance(self.embedding, DTensor) else None
        optimizer = Muon(self, lr=1e-2, group=group, **ADAMW)
        optimizer.use(MUON)
        for step in range(STEPS):
            give_gradients(self, step)
            optimizer.step()
        return self

    def shard(self, *placements: Shard | Replicate | Partial) -> Matrices:
        """Sharded over a mesh with two ranks in each dimension, the last of which has all ranks that are left."""
        ranks = dist.get_world_size()
        mesh = init_device_mesh("cpu", (ranks,) if len(placements) == 1 else (2, ranks // 2))
        for name, parameter in list(self.blocks.items()):
            self.blocks[name] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements))
        self.embedding = nn.Parameter(distribute_tensor(self.embedding.detach(), mesh, placements))
        return self


def unequal_matrices() -> Iterator[str]:
    """Names of the placements and matrices that are not bit for bit those of one process; collective."""
    one = dict(Matrices().trained().named_parameters())
    placements = [(Shard(0),), (Shard(1),)]
    if dist.get_world_size() == 4:
        placements += [(Replicate(), Shard(0)), (Shard(0), Shard(1)), (Shard(0), Shard(0)), (Shard(1), Replicate())]
    whole_round = matrix_exchange.MUON_ROUND_BYTES
    for limit in (whole_round, 64):  # the second one: a matrix a round
        matrix_exchange.MUON_ROUND_BYTES = limit
        for placement in placements:
            for name, parameter in Matrices().shard(*placement).trained().named_parameters():
                assert isinstance(parameter, DTensor)
                if not torch.equal(parameter.full_tensor(), one[name]):
                    yield f"{placement} {name} {limit}"
    matrix_exchange.MUON_ROUND_BYTES = whole_round
