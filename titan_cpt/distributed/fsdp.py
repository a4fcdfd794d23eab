"""FSDP2, and HSDP: replicas of an FSDP2-sharded model."""

from __future__ import annotations

from functools import partial

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.models.common.language_model import LanguageModel


def apply_fsdp(model: LanguageModel, mesh: Mesh, precision: torch.dtype, *, offloaded: bool) -> None:
    """Shard each block, the embedding, and final norm and head together, each as one FSDP2 parameter group.

    A tied embedding belongs to the root's group instead, which stays all-gathered from the beginning of the forward
    pass to the end of the backward pass: the head reads its weight without calling the embedding module. If the `fsdp`
    dimension has size 1, FSDP2 shards nothing but still casts parameters and activations to the compute dtype.

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
        shard(last, reshard_after_forward=False)  # the backward pass needs them first
    shard(model, reshard_after_forward=reshard and not tied)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Each rank's loss is its share of the global batch's mean, so gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            if mesh.process.device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
