"""Tensor parallelism with sequence parallelism, and async tensor parallelism."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.registry import family_module


def apply_tp(model: LanguageModel, mesh: DeviceMesh, *, loss_parallel: bool) -> None:
    """Shard linear layers column-wise and row-wise, and norms and residual stream over sequence positions.

    Sequence parallelism is always on: without it the norms' weights would be plain tensors, and clipping cannot compute
    one gradient norm over plain tensors and DTensors. Source: Korthikanti et al. 2022, arXiv:2205.05198.

    Args:
        model: not sharded yet.
        mesh: the mesh of the tensor-parallel ranks.
        loss_parallel: keep the logits sharded over the vocabulary, as DTensors.
    """
    sequence, replicated = Shard(1), Replicate()
    ends = {
        "embedding": RowwiseParallel(input_layouts=replicated, output_layouts=sequence),
        "final_norm": SequenceParallel(),
        "head": _head_plan(tied=model.spec.tied, loss_parallel=loss_parallel),
    }
    parallelize_module(model, mesh, {name: plan for name, plan in ends.items() if getattr(model, name) is not None})
    family = family_module(model.spec.family, "parallelize")
    for block in model.blocks.values():
        parallelize_module(block, mesh, family.tensor_parallel_plan(model.spec))


def _head_plan(*, tied: bool, loss_parallel: bool) -> ParallelStyle:
    sequence, replicated = Shard(1), Replicate()
    logits: Shard | Replicate = Shard(-1) if loss_parallel else replicated
    if not tied:
        return ColwiseParallel(input_layouts=sequence, output_layouts=logits, use_local_output=not loss_parallel)
    return PrepareModuleInputOutput(  # its second input is the embedding's weight, a DTensor sharded over rows
        input_layouts=(sequence, None),
        desired_input_layouts=(replicated, None),
        output_layouts=Shard(-1),
        desired_output_layouts=logits,
        use_local_output=not loss_parallel,
    )


def enable_async_tp(mesh: DeviceMesh) -> None:
    """Async tensor parallelism: torch.compile overlaps chunks of collectives and matmuls, using symmetric memory.

    CUDA only, and only in compiled blocks. Not tested on GPUs yet.
    """
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group  # not in every build of torch

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)
