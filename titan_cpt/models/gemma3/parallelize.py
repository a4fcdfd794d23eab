"""Tensor-parallel plan of a Gemma 3 block."""

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

from titan_cpt.models.gemma3.spec import Gemma3Spec


def tensor_parallel_plan(spec: Gemma3Spec) -> dict[str, ParallelStyle]:
    """Tensor and sequence parallelism of one block; the residual stream stays sharded over sequence positions.

    The norms after attention and MLP take the reduce-scattered outputs: sequence positions too. The query and key norms
    use `SequenceParallel` over dimension 2, because the heads of their input q_BLNH are sharded. It makes the weights
    of norms replicated DTensors, so that their gradients are summed over the ranks.
    """
    sequence, replicated = Shard(1), Replicate()
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(replicated,)),
        "attention.q": ColwiseParallel(),  # rows of q, k and v are ordered head by head: a shard has whole heads
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.q_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "attention.k_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "attention.out": RowwiseParallel(output_layouts=sequence),
        "post_attention_norm": SequenceParallel(use_local_output=True),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(replicated,)),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=sequence),
        "post_mlp_norm": SequenceParallel(use_local_output=True),
    }
