"""Estimated memory of each rank, in bytes. Calculated, not measured; no torch.

Parameters are exact (see sharding.py). Activations are what autograd saves for the backward pass, block by block; a
test compares them with the saved tensors. Not included: unused memory of the allocator, workspaces of libraries (1 to 2
GiB on CUDA) and communication buffers; `fits` leaves `RESERVE` for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from titan_cpt.distributed.parallel_dims import ParallelDims, RankCoordinates
from titan_cpt.models.common.loss_chunks import LOGITS_CHUNK, logits_chunk
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.parallel import MemoryInputs
from titan_cpt.planning.pipeline_cost import bubble, in_flight
from titan_cpt.planning.sharding import (
    block_parameters,
    gathered_bytes,
    local_parameters,
    lowest_trained_layer,
    muon_matrices,
    stage_layers,
    stage_parameters,
    tp_count,
)
from titan_cpt.planning.traffic import Traffic, traffic

RESERVE = 0.1  # fraction of device memory left free for what the estimate does not include
MUON_ROUND_BYTES = 64 * 2**20
"""Bytes of matrices that a rank owns in a round of Muon's update, and of results that it receives at once."""
_FP32_BYTES = 4
_BF16_BYTES = 2


@dataclass(frozen=True)
class Footprint:
    """Costs of the rank that needs the most memory.

    Attributes:
        local_parameters: parameter elements of each pipeline rank, at coordinate 0 of the other dimensions.
        pipeline_rank: the pipeline rank that the following numbers describe.
        parameters: bytes of fp32 master weights.
        gradients: bytes of the trained weights' gradients: in float32, or in bfloat16 where the optimizer reads such.
        optimizer: bytes of the trained weights' and rows' moments: AdamW's two, or Muon's one.
        gathered: bytes of all-gathered parameters, or of the compute copy of a single process.
        activations: bytes saved for the backward pass, and one block recomputed if activations are checkpointed.
        logits: bytes of the logits and their gradient.
        working: bytes of activation gradients in the backward pass of one layer.
        orthogonalization: bytes of whole matrices, and of what is computed from them, in Muon's update.
        weight_copies: bytes of float32 copies of the weights, such as Reptile's old weights.
        overlap_bytes: gradients, activations, logits and orthogonalization that are never live at the same time;
            subtracted.
        host: bytes in host memory: with CPU offload, and of copies of the weights that are kept there.
        host_copies: those of them that are copies of the weights.
        traffic: bytes sent in a step.
        bubble: fraction of a step's time in which a pipeline rank is idle, see pipeline_cost.py.
    """

    local_parameters: tuple[int, ...]
    pipeline_rank: int
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int
    working: int
    orthogonalization: int
    weight_copies: int
    overlap_bytes: int
    host: int
    host_copies: int
    traffic: Traffic
    bubble: float

    @property
    def memory(self) -> int:
        """Peak device memory in bytes."""
        state = self.parameters + self.gradients + self.optimizer + self.gathered
        work = self.activations + self.logits + self.working + self.orthogonalization
        return state + work + self.weight_copies - self.overlap_bytes


def fits(costs: Footprint, device_bytes: int) -> bool:
    """Whether the estimated memory leaves the reserve free."""
    return costs.memory <= device_bytes * (1 - RESERVE)


def footprint(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs) -> Footprint:
    """The costs of the rank that needs the most memory."""
    local = tuple(
        sum(count for _, count in local_parameters(spec, dims, RankCoordinates(rank, 0, 0, 0, 0)))
        for rank in range(dims.pp)
    )
    ranks = (_of_pipeline_rank(spec, dims, inputs, rank, local) for rank in range(dims.pp))
    return max(ranks, key=lambda costs: costs.memory)


def _of_pipeline_rank(
    spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs, rank: int, local: tuple[int, ...]
) -> Footprint:
    stages = dims.stages_of(rank)
    weights = 0 if inputs.offloaded else local[rank] * _FP32_BYTES
    saved, one_layer = _activations(spec, dims, inputs, rank)
    activations = saved + (one_layer if inputs.recompute != "none" else 0)
    logits = _logits(spec, dims, inputs) if dims.pipeline_stages - 1 in stages else 0
    head = spec.vocab_size * spec.width  # its gradient is in float32 whatever the others are in
    trained = sum(
        n for name, n in local_parameters(spec, dims, RankCoordinates(rank, 0, 0, 0, 0)) if inputs.trains(name)
    )
    gradients_anywhere = min(
        trained * _FP32_BYTES, trained * inputs.gradient_bytes + head * (_FP32_BYTES - inputs.gradient_bytes)
    )
    gradients = 0 if inputs.offloaded else gradients_anywhere
    # Gradients grow while activations are freed: the peak is at the first or at the last layer of the backward pass.
    gradients_before = inputs.accumulation > 1 or dims.pp > 1  # of the previous local batch
    peak = max(saved + logits + (gradients if gradients_before else 0), gradients + one_layer)
    working = round(_working(spec, dims, inputs))
    orthogonalization = _orthogonalization(spec, dims, inputs, stages) if inputs.muon else 0
    optimizer = _optimizer_state(spec, dims, inputs, rank)
    overlap = gradients + activations + logits - peak
    # The update begins when activations are freed: of both, the larger one counts.
    overlap += min(orthogonalization, activations + logits + working - overlap)
    copies_on_host = inputs.copies_on_host + (inputs.copies_beside if inputs.offloaded else 0)
    host_copies = copies_on_host * local[rank] * _FP32_BYTES
    return Footprint(
        local_parameters=local,
        pipeline_rank=rank,
        parameters=weights,
        gradients=gradients,
        optimizer=0 if inputs.offloaded else optimizer,
        gathered=_gathered(spec, dims, inputs, stages),
        activations=activations,
        logits=logits,
        working=working,
        orthogonalization=orthogonalization,
        weight_copies=weights * inputs.copies_beside,
        overlap_bytes=overlap,
        host=host_copies + (local[rank] * _FP32_BYTES + gradients_anywhere + optimizer if inputs.offloaded else 0),
        host_copies=host_copies,
        traffic=traffic(spec, dims, inputs, stages),
        bubble=bubble(dims),
    )


def _optimizer_state(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs, rank: int) -> int:
    """Two numbers in fp32 for each trained parameter; for a matrix that Muon updates one.

    Where only rows of a weight are trained, these may all be on one rank.
    """
    first = RankCoordinates(rank, 0, 0, 0, 0)
    parameters = [each for stage in dims.stages_of(rank) for each in stage_parameters(spec, dims, stage)]
    matrices = {parameter.name for parameter in muon_matrices(parameters)} if inputs.muon else set()
    elements = dict(local_parameters(spec, dims, first))
    if inputs.partition is not None:
        elements = {name: min(n, inputs.partition.elements(name)) for name, n in elements.items()}
    return sum((1 if name in matrices else 2) * _FP32_BYTES * n for name, n in elements.items())


def _orthogonalization(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs, stages: tuple[int, ...]) -> int:
    """What one round of Muon's update needs beside its state.

    Momentum and update of a shard in fp32; in bf16 the matrices that the rank owns, the messages, and their results.
    """
    parameters = [parameter for stage in stages for parameter in stage_parameters(spec, dims, stage)]
    sizes = [parameter.elements for parameter in muon_matrices(parameters) if inputs.trains(parameter.name)]
    if not sizes:
        return 0
    shards = dims.dp_shard * dims.cp * dims.tp
    ranks = shards * dims.dp_replicate
    shard = 2 * _FP32_BYTES * max(sizes) // shards
    if ranks == 1:
        return shard + _BF16_BYTES * max(sizes)
    owned = min(max(MUON_ROUND_BYTES, _BF16_BYTES * max(sizes)), _BF16_BYTES * max(sum(sizes) // ranks, max(sizes)))
    return shard + 4 * owned


def _gathered(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs, stages: tuple[int, ...]) -> int:
    """Unsharded parameters, and unsharded gradients that are not reduced yet."""
    parameters = [parameter for stage in stages for parameter in stage_parameters(spec, dims, stage)]
    count = tp_count(parameters, dims.tp)
    trained = [parameter for parameter in parameters if inputs.trains(parameter.name)]
    if dims.world_size == 1:  # the compute copy
        return count * inputs.bytes_per_number if inputs.bytes_per_number != _FP32_BYTES else 0
    gathered = gathered_bytes(parameters, dims, inputs)
    if dims.reshard_after_forward:  # embedding and head, this block, the next one, and this block's gradients
        block = gathered_bytes(block_parameters(spec, 0), dims, inputs)
        ends = gathered - block * stage_layers(spec, dims, stages)
        by_block = (
            tp_count((each for each in block_parameters(spec, layer) if inputs.trains(each.name)), dims.tp)
            for layer in range(spec.layers)
        )
        gathered = ends + 2 * block + max(by_block) * _FP32_BYTES
    if dims.pp > 1:  # gradients are summed over the micro-batches and reduced once
        gathered += tp_count(trained, dims.tp) * _FP32_BYTES
    return gathered


def layer_activation_bytes(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs) -> tuple[float, float]:
    """Bytes that autograd saves for the backward pass of one block and micro-batch.

    Returns:
        (bytes that stay saved with activation checkpointing, averaged over blocks; bytes that recomputing one block
        adds, 0 without checkpointing).
    """
    per_token = spec.activation_bytes_per_token(tp=dims.tp, cp=dims.cp, dtype_bytes=inputs.bytes_per_number)
    unchecked = inputs.microbatch_tokens * (per_token.compiled if inputs.compiled else per_token.unchecked)
    block_input = inputs.microbatch_tokens * inputs.bytes_per_number * spec.width / dims.tp
    if inputs.recompute == "full":
        return block_input, unchecked
    if inputs.recompute == "selective" and inputs.selection == "op":
        return inputs.microbatch_tokens * per_token.selective_op, unchecked
    if inputs.recompute == "selective":
        every = int(inputs.selection)
        return (block_input + (every - 1) * unchecked) / every, unchecked
    if inputs.recompute == "memory_budget":
        return block_input + inputs.memory_budget * (unchecked - block_input), unchecked
    return unchecked, 0.0


def _activations(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs, rank: int) -> tuple[int, int]:
    """Bytes that all layers of a rank save until their backward pass, and bytes of one layer without checkpointing.

    A frozen layer above a trained one counts like a trained one, although it saves less: not the input of a matrix.
    """
    saved, recomputed = layer_activation_bytes(spec, dims, inputs)
    layers_per_stage = spec.layers / dims.pipeline_stages
    if dims.pp == 1 and inputs.partition is not None:  # blocks below everything that is trained save nothing
        layers_per_stage -= lowest_trained_layer(spec, inputs.partition)
    return round(saved * layers_per_stage * in_flight(dims, rank)), round(recomputed or saved)


def _working(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs) -> float:
    """Gradients of the MLP before and after its activation, 2 F/t, and of the residual stream on both sides, 2 D."""
    return inputs.microbatch_tokens * inputs.bytes_per_number * (2 * spec.mlp_width / dims.tp + 2 * spec.width)


def _logits(spec: ModelSpec, dims: ParallelDims, inputs: MemoryInputs) -> int:
    """Logits and their gradient; with loss parallelism also torch's softmax in fp32.

    In the fused linear cross-entropy the gradient replaces the logits, for one chunk of tokens at a time, and the
    gradient of the head is summed over the chunks in fp32.
    """
    logits = inputs.microbatch_tokens * spec.vocab_size
    if dims.tp == 1 and dims.pp == 1:
        chunks = -(-logits // (LOGITS_CHUNK if inputs.gpu_bytes is None else logits_chunk(inputs.gpu_bytes)))
        if not inputs.trains("embedding.weight" if spec.tied else "head.weight"):
            return logits // chunks * inputs.bytes_per_number
        head = spec.vocab_size * spec.width * _FP32_BYTES if chunks > 1 or inputs.gpu_bytes is not None else 0
        if chunks > 1 and inputs.gpu_bytes is None:  # a GPU adds to the sum without a chunk's share in between
            head += spec.vocab_size * spec.width * inputs.bytes_per_number
        return logits // chunks * inputs.bytes_per_number + head
    if dims.tp == 1 or not dims.loss_parallel:
        return logits * 2 * inputs.bytes_per_number
    return logits // dims.tp * (inputs.bytes_per_number + 2 * _FP32_BYTES)
