"""Which linear layers are converted to float8. Does not import torch: the memory estimate asks the same question."""

from __future__ import annotations

_FLOAT8_MULTIPLE = 16


def in_float8(name: str, size: tuple[int, ...], *, tp: int, filter_fqns: tuple[str, ...]) -> bool:
    """Whether a linear layer multiplies in float8: one of a block, whose sides divide by 16 x TP for the hardware.

    The head does not: its product is one operation with the loss.

    Args:
        name: of the layer or of its weight, in the whole model.
        size: rows and columns of the whole weight.
        filter_fqns: parts of the names of layers that stay in higher precision.
    """
    divides = all(side % (_FLOAT8_MULTIPLE * tp) == 0 for side in size)
    return name.startswith("blocks.") and divides and not any(part in name for part in filter_fqns)
