"""From a config and a world size to parallelism degrees, and what the memory and traffic estimates need to know."""

from __future__ import annotations

from dataclasses import dataclass

from titan_cpt.config.schema import Config
from titan_cpt.distributed.parallel_dims import ParallelDims


def min_world_size(config: Config) -> int:
    """The smallest number of ranks that the config's degrees can be laid over."""
    asked = config.parallelism
    model = asked.tensor_parallel_degree * asked.pipeline_parallel_degree * asked.context_parallel_degree
    return model * asked.data_parallel_replicate_degree * (asked.data_parallel_shard_degree or 1)


def parallel_dims_of(config: Config, world_size: int) -> ParallelDims:
    """The layout that the config asks for on so many ranks; whether it can be is `parallel_problems`' to say."""
    asked = config.parallelism
    pp, tp, cp = asked.pipeline_parallel_degree, asked.tensor_parallel_degree, asked.context_parallel_degree
    replicate = asked.data_parallel_replicate_degree
    reshard = asked.fsdp_reshard_after_forward
    return ParallelDims(
        dp_replicate=replicate,
        dp_shard=asked.data_parallel_shard_degree or max(1, world_size // (pp * tp * cp * replicate)),
        cp=cp,
        tp=tp,
        pp=pp,
        schedule=asked.pipeline_parallel_schedule,
        microbatches=max(1, config.training.local_batch_size // asked.pipeline_parallel_microbatch_size)
        if pp > 1
        else 1,
        reshard_after_forward=reshard == "always" or (reshard == "default" and pp == 1),
        loss_parallel=not asked.disable_loss_parallel,
    )


@dataclass(frozen=True)
class MemoryInputs:
    """What a rank is given to do, beside the layout.

    Attributes:
        microbatch_tokens: T, of one forward pass of one context-parallel rank.
        accumulation: local batches of a step.
        bytes_per_number: of parameters and activations while they are multiplied: 2 in bfloat16, 4 in float32.
        recompute: "none", "full", "selective" or "memory_budget".
        selection: "op", or n for every n-th block.
        memory_budget: share of the activations kept under "memory_budget".
        offloaded: parameters, gradients and the optimizer lie in the host's memory.
        float8_filter_fqns: where weights are gathered in float8, parts of the names of those that are not.
    """

    microbatch_tokens: int
    accumulation: int
    bytes_per_number: int
    recompute: str
    selection: str
    memory_budget: float
    offloaded: bool = False
    float8_filter_fqns: tuple[str, ...] | None = None
