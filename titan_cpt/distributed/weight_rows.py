"""Which rows of a weight a rank has, and rows as a parameter of their own, so that the optimizer updates no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_cpt.distributed.float8 import local_values


def local_slices(weight: Tensor) -> list[slice]:
    """The part of the whole weight that this rank's shard is, as one slice for each dimension."""
    if not isinstance(weight, DTensor):
        return [slice(0, length) for length in weight.shape]
    lengths, offsets = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return [slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True)]


class WeightRows:
    """This rank's share of some rows of a weight, in the weight's memory; a rank may have none of them.

    Args:
        name: the weight's name in the whole model.
        weight: a plain tensor, or a DTensor of which this rank's shard is one block.
        rows: the first row and the one behind the last, of the whole weight.
    """

    parameter: nn.Parameter
    """A plain tensor of these rows, also where the weight is a DTensor."""

    def __init__(self, name: str, weight: Tensor, rows: tuple[int, int]) -> None:
        self.name = name
        self.weight = weight
        here = local_slices(weight)[0]
        self.first, self.stop = (max(0, min(here.stop, row) - here.start) for row in rows)
        self.parameter = nn.Parameter(self.of(local_values(weight)))

    def of(self, local: Tensor) -> Tensor:
        """These rows of a tensor with the shape of this rank's shard, in its memory."""
        return local[self.first : self.stop]

    def take_gradient(self) -> None:
        """Make the parameter's gradient these rows of the weight's gradient, in its memory; call after backward.

        The parameter follows the weight where FSDP has moved that to other memory, as it does for CPU offload.
        """
        rows = self.of(local_values(self.weight))
        if rows.data_ptr() != self.parameter.data_ptr():
            self.parameter.data = rows
        gradient = self.weight.grad
        self.parameter.grad = None if gradient is None else self.of(local_values(gradient))

    def empty_weight(self) -> Tensor:
        """Zeros with the weight's shape and sharding, in host memory."""
        local = torch.zeros_like(local_values(self.weight), device="cpu")
        if not isinstance(self.weight, DTensor):
            return local
        # DTensor.from_local would move the tensor to the device of the mesh.
        return DTensor(local, self.weight._spec, requires_grad=False)  # type: ignore[no-untyped-call]
