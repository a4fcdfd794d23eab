"""How a plain model is laid over the ranks, from outside: a line for each technique, in torchtitan's order."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from titan_cpt.distributed.mesh import Ranks


def parallelise(model: nn.Module, ranks: Ranks, *, precision: torch.dtype, reshard_after_forward: bool) -> None:
    """Shard the model over the data-parallel ranks (FSDP2), block by block and then what is left; in place.

    A single process is left as it is.

    Args:
        precision: what parameters are gathered and multiplied in; gradients are reduced in float32.
        reshard_after_forward: gather a block's parameters again for the backward pass instead of keeping them.
    """
    if ranks.mesh is None:
        return
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, output_dtype=torch.float32)
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleDict), "a model's blocks are a ModuleDict keyed by the layer's number"
    for block in blocks.values():
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already a share of the global batch's mean: sum gradients over ranks, do not average them.
            module.set_gradient_divide_factor(1.0)
            if ranks.device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
