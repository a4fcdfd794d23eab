"""Parallelism degrees of a config, the layers of each pipeline rank, and the inputs of the memory model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from titan_cpt.common.weights.partition import Partition
from titan_cpt.config.schema import Config
from titan_cpt.distributed.parallel_dims import ParallelDims


def min_world_size(config: Config) -> int:
    """The smallest number of ranks that the config's parallelism degrees allow."""
    degrees = config.parallelism
    model = degrees.tensor_parallel_degree * degrees.pipeline_parallel_degree * degrees.context_parallel_degree
    return model * degrees.data_parallel_replicate_degree * (degrees.data_parallel_shard_degree or 1)


def parallel_dims_of(config: Config, world_size: int) -> ParallelDims:
    """The config's parallelism degrees on `world_size` ranks; `parallel_problems` checks whether they are valid."""
    degrees = config.parallelism
    pp = degrees.pipeline_parallel_degree
    tp = degrees.tensor_parallel_degree
    cp = degrees.context_parallel_degree
    replicate = degrees.data_parallel_replicate_degree
    reshard = degrees.fsdp_reshard_after_forward
    microbatches = config.training.local_batch_size // degrees.pipeline_parallel_microbatch_size
    return ParallelDims(
        dp_replicate=replicate,
        dp_shard=degrees.data_parallel_shard_degree or max(1, world_size // (pp * tp * cp * replicate)),
        cp=cp,
        tp=tp,
        pp=pp,
        schedule=degrees.pipeline_parallel_schedule,
        microbatches=max(1, microbatches) if pp > 1 else 1,
        microbatch_size=degrees.pipeline_parallel_microbatch_size if pp > 1 else 1,
        reshard_after_forward=reshard == "always" or (reshard == "default" and pp == 1),
        loss_parallel=not degrees.disable_loss_parallel,
    )


@dataclass(frozen=True)
class PipelineRankContents:
    """The part of the model on one pipeline rank.

    Attributes:
        pipeline_rank: 0 to pp - 1.
        ranks: the ranks that hold this part, or shards of it.
        parts: its parts in words, such as "embedding" and "layers 0 to 8".
    """

    pipeline_rank: int
    ranks: range
    parts: list[str]


def pipeline_rank_contents(dims: ParallelDims, layers: int) -> Iterator[PipelineRankContents]:
    """The parts of a model with this number of layers on each pipeline rank."""
    group = dims.world_size // dims.pp
    for rank in range(dims.pp):
        parts = []
        for stage in dims.stages_of(rank):
            stage_layers = dims.layers_of(stage, layers)
            parts += ["embedding"] if stage == 0 else []
            parts.append(
                f"layers {stage_layers[0]} to {stage_layers[-1]}"
                if len(stage_layers) > 1
                else f"layer {stage_layers[0]}"
            )
            parts += ["final norm and head"] if stage == dims.pipeline_stages - 1 else []
        yield PipelineRankContents(rank, range(rank * group, (rank + 1) * group), parts)


@dataclass(frozen=True)
class MemoryInputs:
    """Inputs of the memory and communication estimates, besides the model and the parallelism degrees.

    Attributes:
        microbatch_tokens: T, tokens of one forward pass on one context-parallel rank.
        accumulation: gradient accumulation steps.
        bytes_per_number: bytes of a parameter or activation in the compute dtype: 2 in bfloat16, 4 in float32.
        recompute: activation checkpointing: "none", "full", "selective" or "memory_budget".
        selection: with "selective": "op", or n to checkpoint every n-th block.
        memory_budget: with "memory_budget": the share of the activations that is kept.
        offloaded: CPU offload of parameters, gradients and optimizer state.
        float8_filter_fqns: with float8 all-gather: layers whose names contain one of these are gathered in the compute
            dtype; None without it.
        gradient_bytes: bytes of a gradient before the update, except the head's, which are always 4.
        gpu_bytes: memory of the GPU; None on a CPU, or if it is not known.
        compiled: blocks are compiled with torch.compile.
        muon: Muon updates the matrices of the blocks.
        copies_beside: float32 copies of the weights that are kept where the weights are.
        copies_on_host: those that are kept in host memory.
        partition: what is trained; None: all weights.
    """

    microbatch_tokens: int
    accumulation: int
    bytes_per_number: int
    recompute: str
    selection: str
    memory_budget: float
    offloaded: bool = False
    float8_filter_fqns: tuple[str, ...] | None = None
    gradient_bytes: int = 4
    gpu_bytes: int | None = None
    compiled: bool = False
    muon: bool = False
    copies_beside: int = 0
    copies_on_host: int = 0
    partition: Partition | None = None

    def trains(self, name: str) -> bool:
        """Whether a weight, or some of its rows, is trained: then its whole gradient exists."""
        return self.partition is None or bool(self.partition.parts[name])


def memory_inputs(
    config: Config, dims: ParallelDims, accumulation: int, *, gpu_bytes: int | None = None
) -> MemoryInputs:
    """The inputs of the memory model from the config."""
    reduced = config.training.mixed_precision_param == "bfloat16"
    in_one_pass = config.optimizer.implementation == "triton" and dims.world_size == 1 and accumulation == 1
    checkpointing = config.activation_checkpoint
    sequences = config.training.local_batch_size // dims.microbatches
    return MemoryInputs(
        microbatch_tokens=sequences * config.training.seq_len // dims.cp,
        accumulation=accumulation,
        bytes_per_number=2 if reduced else 4,
        recompute=checkpointing.mode,
        selection=checkpointing.selective_ac_option,
        memory_budget=checkpointing.memory_budget,
        offloaded=config.training.enable_cpu_offload,
        float8_filter_fqns=config.float8.filter_fqns if config.float8.enable_fsdp_float8_all_gather else None,
        gradient_bytes=2 if reduced and in_one_pass else 4,
        gpu_bytes=gpu_bytes,
        compiled=config.compile.enable,
    )
