"""Dry run of a parallel layout: builds the sharded model on the meta device in a fake process group of any size.

No memory is allocated and nothing is communicated, so a layout of thousands of ranks can be checked on a laptop before
the job is queued. The parameters that each rank would hold are compared with the plan's, computed without torch.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_cpt.distributed.device_mesh import build_mesh
from titan_cpt.distributed.float8 import require_float8
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallelize import parallelize, plain_name
from titan_cpt.distributed.pipeline_parallel import build_pipeline_stage
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import PlanError
from titan_cpt.planning.plan import Plan
from titan_cpt.planning.sharding import local_parameters


def check_layout(plan: Plan, parallel_options: ParallelOptions) -> Iterator[str]:
    """Build the model of the first and the last rank of every pipeline stage, and compare it with the plan.

    Yields:
        A line to print for each of these ranks, then one with the time and the peak memory.

    Raises:
        ConfigError: float8 is configured and torchao is not installed.
        PlanError: a rank would hold other parameters than the plan says; the message names the first.
    """
    if parallel_options.float8 is not None:
        require_float8(torch.device("cpu"))
    start_time = time.perf_counter()
    dims = plan.parallel_dims
    ranks_per_stage = dims.world_size // dims.pp
    for pp_rank in range(dims.pp):
        for rank in sorted({pp_rank * ranks_per_stage, (pp_rank + 1) * ranks_per_stage - 1}):
            built = _local_elements(plan, parallel_options, rank)
            planned = dict(local_parameters(plan.spec, dims, dims.coordinates(rank)))
            if built != planned:
                name = next(name for name in sorted({*built, *planned}) if built.get(name) != planned.get(name))
                raise PlanError(
                    f"--check-layout: rank {rank:,} would hold {built.get(name, 0):,} elements of {name}, the plan "
                    f"says {planned.get(name, 0):,}; this is a bug of titan_cpt"
                )
            yield f"rank {rank:,}: {len(built)} parameters, {sum(built.values()):,} elements, as planned"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    yield f"checked in {time.perf_counter() - start_time:.1f} s and {peak:.2f} GiB"


def _local_elements(plan: Plan, parallel_options: ParallelOptions, rank: int) -> dict[str, int]:
    """Number of elements that a rank holds of each parameter, by the parameter's name in the unsharded model."""
    dims = plan.parallel_dims
    if dims.world_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=dims.world_size)
    elements = {}
    try:
        mesh = build_mesh(ProcessInfo(rank, dims.world_size, torch.device("cpu")), dims)
        for stage in dims.stages_of(mesh.coordinates.pipeline):
            model = build_pipeline_stage(plan.spec, mesh, stage)
            parallelize(model, mesh, parallel_options)
            for name, parameter in model.named_parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                elements[plain_name(name)] = local.numel()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return elements
