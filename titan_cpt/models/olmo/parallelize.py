"""Tensor-parallel plan of an OLMo block."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

from titan_cpt.models.olmo.spec import OlmoSpec


class _ShardedFeatures(ParallelStyle):
    """Shards the scale of a `ShardableRMSNorm` like the heads that it normalizes; the norm then sums over ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, _shard_weight)


def _shard_weight(_name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
    for name, weight in list(module.named_parameters(recurse=False)):
        sharded = distribute_tensor(weight, device_mesh, [Shard(0)])
        module.register_parameter(name, nn.Parameter(sharded, requires_grad=weight.requires_grad))


def tensor_parallel_plan(_spec: OlmoSpec) -> dict[str, ParallelStyle]:
    """Tensor and sequence parallelism of one block; the residual stream stays sharded over sequence positions."""
    sequence, replicated = Shard(1), Replicate()
    return {
        "attention": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(replicated,)),
        "attention.q": ColwiseParallel(),  # rows of q, k and v are ordered head by head: a shard has whole heads
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.q_norm": _ShardedFeatures(),
        "attention.k_norm": _ShardedFeatures(),
        "attention.out": RowwiseParallel(output_layouts=sequence),
        "post_attention_norm": SequenceParallel(use_local_output=True),
        "mlp": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(replicated,)),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=sequence),
        "post_mlp_norm": SequenceParallel(use_local_output=True),
    }
