"""Which linear layers are converted to float8; used by the conversion and the memory estimate. No torch."""

from __future__ import annotations

_FLOAT8_MULTIPLE = 16


def in_float8(name: str, size: tuple[int, ...], *, tp: int, filter_fqns: tuple[str, ...]) -> bool:
    """Whether a linear layer is converted: in a block, with dimensions that divide by 16 x TP, as the hardware needs.

    The output head is not converted: its product is fused with the loss.

    Args:
        name: name of the layer, or of its weight, in the unsharded model.
        size: rows and columns of the unsharded weight.
        tp: tensor-parallel degree.
        filter_fqns: a layer whose name contains one of these is not converted.
    """
    divides = all(side % (_FLOAT8_MULTIPLE * tp) == 0 for side in size)
    return name.startswith("blocks.") and divides and not any(part in name for part in filter_fqns)
