"""Local parameter counts: all ranks together hold the model once, and replicated parameters once per rank."""

from __future__ import annotations

import pytest
import torch

from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.models.build import build_model
from titan_cpt.planning.sharding import local_parameters
from unit.planning.test_memory import LLAMAS, SPEC


@pytest.mark.parametrize(
    "dims",
    [
        ParallelDims(dp_shard=3),
        ParallelDims(dp_shard=5, tp=2),
        ParallelDims(dp_shard=2, cp=2, tp=4, pp=2, schedule="1F1B"),
        ParallelDims(dp_shard=3, pp=2, schedule="ZBVZeroBubble"),
    ],
)
def test_the_ranks_hold_every_parameter_once(dims: ParallelDims) -> None:
    """Summed over ranks, without the copies of replicated parameters on tensor-parallel ranks."""
    total = replicated = 0
    for rank in range(dims.world_size):
        coordinates = dims.coordinates(rank)
        for name, count in local_parameters(SPEC, dims, coordinates):
            is_replicated = "norm" in name or name.endswith(("out.bias", "down.bias"))
            total += 0 if is_replicated and coordinates.tensor else count
            replicated += count if is_replicated and coordinates.tensor else 0

    assert total == SPEC.parameters
    assert (replicated > 0) == (dims.tp > 1)


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("dims", [ParallelDims(), ParallelDims(dp_shard=5), ParallelDims(dp_shard=3, tp=2)])
def test_local_counts_add_up_to_the_built_model(name: str, dims: ParallelDims) -> None:
    """By parameter name; norms are replicated on tensor-parallel ranks, everything else is sharded."""
    spec = LLAMAS[name]
    with torch.device("meta"):
        expected = {name: parameter.numel() for name, parameter in build_model(spec).named_parameters()}
    held = dict.fromkeys(expected, 0)
    for rank in range(dims.world_size):
        for name, count in local_parameters(spec, dims, dims.coordinates(rank)):
            held[name] += count

    assert held == {name: count * (dims.tp if "norm" in name else 1) for name, count in expected.items()}
