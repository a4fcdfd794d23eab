"""Local parameter counts: all ranks together hold the model once, and replicated parameters once per rank."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.models.build import build_model
from titan_cpt.planning.sharding import gathered_bytes, local_parameters, stage_parameters
from unit.planning.test_memory import LLAMAS, SPEC, WORK


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

    sharded = ("attention.q_norm", "attention.k_norm") if spec.family == "olmo" else ()  # of the whole width
    copies = {name: dims.tp if "norm" in name and not any(each in name for each in sharded) else 1 for name in expected}
    assert held == {name: count * copies[name] for name, count in expected.items()}


@pytest.mark.parametrize("tp", [1, 2])
def test_gathered_parameters_take_the_compute_dtype_or_one_byte_in_float8(tp: int) -> None:
    """In bfloat16; of a block, the four matrices are cast to float8, the biases and norms are not."""
    dims = ParallelDims(dp_shard=4, tp=tp)
    parameters = list(stage_parameters(SPEC, dims, 0))
    plain = dataclasses.replace(WORK, bytes_per_number=2)
    float8 = dataclasses.replace(plain, float8_filter_fqns=())
    matrices = 4 * (3 * 128 * 128 + 128 * 128 + 2 * 128 * 512)
    replicated = sum(parameter.elements for parameter in parameters if parameter.tp_dim is None)

    assert gathered_bytes(parameters, dims, plain) == 2 * ((SPEC.parameters - replicated) // tp + replicated)
    assert gathered_bytes(parameters, dims, plain) - gathered_bytes(parameters, dims, float8) == matrices // tp
