"""Write whole rows of the vocabulary weights into a model, under any parallelism degrees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titan_cpt.checkpoint.state_dict import master_weights
from titan_cpt.distributed.float8 import local_values
from titan_cpt.distributed.weight_rows import local_slices


class NewValues(NamedTuple):
    """Values for some rows of a weight.

    Attributes:
        ids: int64 [N], the rows.
        values: float32 [N, width], or [width] for the same values in all rows.
    """

    ids: Tensor
    values: Tensor


@torch.no_grad()
def write_rows(model: nn.Module, changes: Mapping[str, NewValues]) -> None:
    """Write rows into this rank's shards of the float32 weights, in place; rows beyond the weight are ignored."""
    weights = master_weights(model) if changes else {}
    for name in weights.keys() & changes.keys():
        rows, columns = local_slices(weights[name])
        ids, values = changes[name]
        here = (ids >= rows.start) & (ids < rows.stop)
        own = values.expand(len(ids), -1)[here][:, columns]
        local = local_values(weights[name])
        local[(ids[here] - rows.start).to(local.device)] = own.to(local.device)
