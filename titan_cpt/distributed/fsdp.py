"""FSDP2, and HSDP over a mesh of two dimensions."""

from __future__ import annotations

from functools import partial

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.models.common.language_model import LanguageModel


def apply_fsdp(model: LanguageModel, mesh: Mesh, precision: torch.dtype, *, offloaded: bool) -> None:
    """Shard each block, the embedding, and the head with its norm.

    A tied embedding is used at both ends of the model and by the head without a call of its module. So it belongs to
    the root, which stays all-gathered from the first forward to the end of the backward pass. With one data-parallel
    rank nothing is sharded, but parameters and activations are cast to the compute dtype.

    Args:
        model: a whole model or a pipeline stage.
        mesh: parameters are sharded over its `fsdp` dimension.
        precision: dtype of computation and of gathered parameters; gradients are reduced in float32.
        offloaded: keep parameters, gradients and optimizer state in host memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    # Pinned memory needs CUDA; on a CPU the parameters are in host memory anyway.
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offloaded else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh.fsdp, mp_policy=policy, offload_policy=offload)
    reshard = mesh.parallel_dims.reshard_after_forward
    tied = model.head is not None and model.spec.tied
    if model.embedding is not None and not tied:
        shard(model.embedding, reshard_after_forward=reshard)
    for block in model.blocks.values():
        shard(block, reshard_after_forward=reshard)
    last = [module for module in (model.final_norm, model.head) if module is not None and not tied]
    if last:
        shard(last, reshard_after_forward=False)  # the backward pass begins with them
    shard(model, reshard_after_forward=reshard and not tied)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is a share of the global batch's mean: sum gradients over ranks, do not average them.
            module.set_gradient_divide_factor(1.0)
            if mesh.process.device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
