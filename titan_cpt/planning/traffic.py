"""Estimated communication: bytes that one rank sends in an optimizer step. Calculated, not measured; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.parallel import MemoryInputs
from titan_cpt.planning.sharding import gathered_bytes, muon_matrices, stage_layers, stage_parameters, tp_count

_FP32_BYTES = 4
_BF16_BYTES = 2


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step, by parallelism technique.

    Attributes:
        fsdp: all-gathers of parameters and reduce-scatters of gradients; with HSDP also their all-reduce.
        tensor: all-gathers and reduce-scatters of activations.
        context: keys, values and their gradients.
        pipeline: activations and their gradients between pipeline stages.
        optimizer: matrices to the ranks that orthogonalize them, and back, with Muon; the mean over the ranks.
    """

    fsdp: int
    tensor: int
    context: int
    pipeline: int
    optimizer: int = 0

    @property
    def total(self) -> int:
        """Bytes of all techniques."""
        return self.fsdp + self.tensor + self.context + self.pipeline + self.optimizer


def traffic(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs, stages: tuple[int, ...]) -> Traffic:
    """The traffic of a rank that holds these pipeline stages."""
    return Traffic(
        fsdp=round(_fsdp(spec, dims, inputs, stages)),
        tensor=round(_tensor(spec, dims, inputs, stages)),
        context=round(_context(spec, dims, inputs, stages)),
        pipeline=_pipeline(spec, dims, inputs, stages),
        optimizer=round(_optimizer(spec, dims, stages)) if inputs.muon else 0,
    )


def _fsdp(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs, stages: tuple[int, ...]) -> float:
    """One or two all-gathers and a reduce-scatter per local batch; with HSDP an all-reduce (a ring sends it twice)."""
    parameters = [parameter for stage in stages for parameter in stage_parameters(spec, dims, stage)]
    gathered = gathered_bytes(parameters, dims, inputs)
    gradients = tp_count(parameters, dims.tp) * _FP32_BYTES
    shards = dims.dp_shard * dims.cp
    not_resharded = _not_resharded(spec, dims, stages) * inputs.bytes_per_number
    gathers = 2 * gathered - not_resharded if dims.reshard_after_forward else gathered
    sent = (shards - 1) / shards * (gathers + gradients) * inputs.accumulation
    replicas = (dims.dp_replicate - 1) / dims.dp_replicate
    return sent + 2 * tp_count(parameters, dims.tp) / shards * _FP32_BYTES * replicas * inputs.accumulation


def _not_resharded(spec: ModelSpec, dims: ParallelDims, stages: tuple[int, ...]) -> int:
    """Elements that stay gathered between forward and backward: the final norm and the head, or the tied embedding."""
    last = dims.pipeline_stages - 1
    if last not in stages:
        return 0
    ends = ("final_norm", "head", "embedding") if spec.tied else ("final_norm", "head")
    parameters = stage_parameters(spec, dims, last)
    return tp_count((parameter for parameter in parameters if parameter.name.startswith(ends)), dims.tp)


def _tensor(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs, stages: tuple[int, ...]) -> float:
    """Two all-gathers and two reduce-scatters per layer forward, as many backward, and two more if recomputed.

    Not counted: the sums of squares of OLMo's query and key norms, two numbers per token and layer.
    """
    moved = inputs.microbatch_tokens * spec.width * inputs.bytes_per_number * (dims.tp - 1) / dims.tp
    collectives = (8 + (4 if inputs.recompute == "full" else 0)) * stage_layers(spec, dims, stages)
    collectives += 2 * (0 in stages) + 2 * (dims.pipeline_stages - 1 in stages)
    return moved * collectives * _passes(dims, inputs)


def _context(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs, stages: tuple[int, ...]) -> float:
    """Keys and values of the other ranks in the forward pass, and their gradients in fp32 in the backward pass."""
    forward = 2 if inputs.recompute == "full" else 1
    moved = 2 * inputs.microbatch_tokens * spec.kv_width / dims.tp * (forward * inputs.bytes_per_number + _FP32_BYTES)
    return moved * (dims.cp - 1) * stage_layers(spec, dims, stages) * _passes(dims, inputs)


def _pipeline(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs, stages: tuple[int, ...]) -> int:
    """The residual stream to the next stage and its gradient to the one before, unless they are on the same rank."""
    moved = inputs.microbatch_tokens * spec.width // dims.tp * inputs.bytes_per_number * _passes(dims, inputs)
    neighbors = [stage + offset for stage in stages for offset in (-1, 1)]
    return moved * sum(0 <= stage < dims.pipeline_stages and stage not in stages for stage in neighbors)


def _optimizer(spec: ModelSpec, dims: ParallelDims, stages: tuple[int, ...]) -> float:
    """Each matrix in bf16: one replica's shards to its owner, and a shard from the owner to every other rank."""
    parameters = [parameter for stage in stages for parameter in stage_parameters(spec, dims, stage)]
    elements = sum(parameter.elements for parameter in muon_matrices(parameters))
    shards = dims.dp_shard * dims.cp * dims.tp
    ranks = shards * dims.dp_replicate
    return elements / ranks * _BF16_BYTES * ((shards - 1) / shards + (ranks - 1) / shards)


def _passes(dims: ParallelDims, inputs: MemoryInputs) -> int:
    """Forward passes of a step."""
    return dims.microbatches * inputs.accumulation
