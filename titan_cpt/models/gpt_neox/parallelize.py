"""Tensor-parallel plan of a GPT-NeoX block."""

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

from titan_cpt.models.gpt_neox.spec import GPTNeoXSpec


def tensor_parallel_plan(_spec: GPTNeoXSpec) -> dict[str, ParallelStyle]:
    """Tensor and sequence parallelism of one block; the residual stream stays sharded over sequence positions."""
    sequence, replicated = Shard(1), Replicate()
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(replicated,)),
        "attention.qkv": ColwiseParallel(),  # its rows are ordered head by head: a shard has whole heads
        "attention.out": RowwiseParallel(output_layouts=sequence),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(replicated,)),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=sequence),
    }
