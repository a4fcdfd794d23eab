"""Selects the linear layers to convert to float8, for the conversion and the memory estimate. Does not import torch."""

from __future__ import annotations

_FLOAT8_MULTIPLE = 16
AUTO_FILTER = "auto_filter_small_kn"
"""In `filter_fqns`, as in torchtitan: do not convert layers that are `too_small`."""


def too_small(size: tuple[int, ...], recipe: str) -> bool:
    """Whether a linear layer's products are faster in bfloat16 than in float8, by torchao's thresholds for H100s.

    Casting reads and writes the operands once more, which only large products pay back. Source: torchao 0.18,
    torchao/float8/float8_linear_utils.py, from the tables in torchao/float8/README.md, "Performance". For
    rowwise_with_gw_hp torchao has no thresholds; those of rowwise are used, since two of its products are the same.

    Args:
        size: rows (output features) and columns (input features) of the unsharded weight.
    """
    rows, columns = size
    if recipe == "tensorwise":
        return rows <= 1024 and columns <= 4096
    return rows <= 2048 or columns <= 1024 or (rows <= 4096 and columns <= 2048)


def in_float8(name: str, size: tuple[int, ...], *, tp: int, filter_fqns: tuple[str, ...], recipe: str) -> bool:
    """Whether to convert a linear layer: it is in a block, and both dimensions are multiples of 16 x tp.

    Float8 matrix multiplication needs multiples of 16 in each tensor-parallel shard. The output head is not converted,
    because its matrix product is fused with the loss.

    Args:
        name: name of the layer, or of its weight, in the unsharded model.
        size: rows and columns of the unsharded weight.
        tp: tensor-parallel degree.
        filter_fqns: a layer whose name contains one of these is not converted; with `AUTO_FILTER` in it, neither is one
            that is `too_small`.
        recipe: torchao's float8 recipe.
    """
    divides = all(side % (_FLOAT8_MULTIPLE * tp) == 0 for side in size)
    excluded = any(part in name for part in filter_fqns) or (AUTO_FILTER in filter_fqns and too_small(size, recipe))
    return name.startswith("blocks.") and divides and not excluded
