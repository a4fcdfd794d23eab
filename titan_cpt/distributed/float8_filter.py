"""Selects the linear layers to convert to float8, for the conversion and the memory estimate. Does not import torch."""

from __future__ import annotations

_FLOAT8_MULTIPLE = 16


def in_float8(name: str, size: tuple[int, ...], *, tp: int, filter_fqns: tuple[str, ...]) -> bool:
    """Whether to convert a linear layer: it is in a block, and both dimensions are multiples of 16 x tp.

    Float8 matrix multiplication needs multiples of 16 in each tensor-parallel shard. The output head is not converted,
    because its matrix product is fused with the loss.

    Args:
        name: name of the layer, or of its weight, in the unsharded model.
        size: rows and columns of the unsharded weight.
        tp: tensor-parallel degree.
        filter_fqns: a layer whose name contains one of these is not converted.
    """
    divides = all(side % (_FLOAT8_MULTIPLE * tp) == 0 for side in size)
    return name.startswith("blocks.") and divides and not any(part in name for part in filter_fqns)
