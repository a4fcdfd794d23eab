"""Tensor-parallel plan of a Llama block."""

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

from titan_cpt.models.llama.spec import LlamaSpec


def tensor_parallel_plan(spec: LlamaSpec) -> dict[str, ParallelStyle]:
    """Tensor and sequence parallelism of one block; the residual stream stays sharded over sequence positions.

    The query and key norms (Qwen3) use `SequenceParallel` over dimension 2, because the heads of their input q_BLNH are
    sharded. It makes their weights replicated DTensors, so that their gradients are summed over the ranks.
    """
    sequence, replicated = Shard(1), Replicate()
    head_norms = ("attention.q_norm", "attention.k_norm") if spec.qk_norm else ()
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(replicated,)),
        "attention.q": ColwiseParallel(),  # rows of q, k and v are ordered head by head: a shard has whole heads
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        **{name: SequenceParallel(sequence_dim=2, use_local_output=True) for name in head_norms},
        "attention.out": RowwiseParallel(output_layouts=sequence),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(replicated,)),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=sequence),
    }
