"""What a layout costs each rank: bytes of memory, bytes sent per step, and the share of time a pipeline stands idle.

Worked out, not measured; pure numbers. Parameters are counted exactly, as FSDP2 and tensor parallelism cut them
(`titan-cpt plan --check-layout` holds the count against the sharded model). Activations are what autograd saves for the
backward pass, layer by layer (a test holds them against the saved tensors). What the allocator wastes, the libraries'
work space (1 to 2 GiB on CUDA) and communication buffers come on top.

Letters: D width, A width of all queries, K width of all keys, F feed-forward width, V vocabulary, T tokens of one
micro-batch on one rank, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from titan_cpt.distributed.float8_filter import in_float8
from titan_cpt.distributed.parallel_dims import ParallelDims, RankCoordinates
from titan_cpt.models.common.loss_chunks import LOGITS_CHUNK
from titan_cpt.models.spec import LlamaSpec, ModelSpec
from titan_cpt.planning.parallel import MemoryInputs
from titan_cpt.planning.pipeline_cost import bubble, in_flight

_FP32 = 4

Parameter = tuple[str, tuple[int, ...], int | None]
"""Name, shape, and the dimension that tensor parallelism cuts (None: held by all)."""

RESERVE = 0.1  # of a device's memory, for the libraries' work space, communication buffers and the allocator's gaps


@dataclass(frozen=True)
class Footprint:
    """The costs of the rank that has most to hold; all in bytes, communication as sent per step.

    Attributes:
        local_parameters: numbers that the rank keeps, of each pipeline rank in turn (at shard 0 and tensor place 0).
        working: gradients of the activations that one layer's backward pass is at.
        never_at_once: what the sum of the others counts too much: as gradients of weights come, activations go.
        host: held in the host's memory instead of the device's.
        bubble: share of a step's time in which a pipeline rank waits, as pipeline_costs.py counts it.
        heaviest: the pipeline rank whose memory this is.
    """

    local_parameters: tuple[int, ...]
    heaviest: int
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int
    working: int
    never_at_once: int
    sent_fsdp: int
    sent_tensor: int
    sent_context: int
    sent_pipeline: int
    bubble: float
    host: int

    @property
    def memory(self) -> int:
        """The most that is held at once."""
        parts = (self.parameters, self.gradients, self.optimizer, self.gathered, self.activations, self.logits)
        return sum(parts) + self.working - self.never_at_once

    @property
    def sent(self) -> int:
        """All bytes that one rank sends in a step."""
        return self.sent_fsdp + self.sent_tensor + self.sent_context + self.sent_pipeline


def footprint(spec: ModelSpec, layout: ParallelDims, work: MemoryInputs) -> Footprint:
    """The costs of a layout."""
    local = tuple(
        sum(count for _, count in local_parameters(spec, layout, RankCoordinates(rank, 0, 0, 0, 0)))
        for rank in range(layout.pp)
    )
    return max((_of_rank(spec, layout, work, rank, local) for rank in range(layout.pp)), key=lambda costs: costs.memory)


def _of_rank(spec: ModelSpec, layout: ParallelDims, work: MemoryInputs, rank: int, local: tuple[int, ...]) -> Footprint:
    stages = layout.stages_of(rank)
    held = sum(_unsharded(spec, layout, stage) for stage in stages)
    block = _count_cut(block_parameters(spec), layout.tp)
    one_block = tuple((f"blocks.0.{name}", size, cut) for name, size, cut in block_parameters(spec))
    sent_block = _gathered_bytes(one_block, layout, work)
    sent_all = sum(_gathered_bytes(tuple(_stage_parameters(spec, layout, stage)), layout, work) for stage in stages)
    ends = sent_all - sent_block * len(_layers(spec, layout, stages))
    if layout.world_size == 1:
        gathered = held * work.bytes_per_number if work.bytes_per_number != _FP32 else 0  # the working copy
    elif layout.reshard_after_forward:
        gathered = ends + 2 * sent_block + block * _FP32  # this block, the next one, and its gradients
    else:
        gathered = sent_all
    if layout.pp > 1:
        gathered += held * _FP32  # gradients are summed whole over the micro-batches and reduced once
    on_device = 0 if work.offloaded else local[rank] * _FP32
    once = _gathered_once(spec, layout, stages) * work.bytes_per_number
    kept, layer = _activations(spec, layout, work, rank)
    recomputed = layer if work.recompute != "none" else 0
    logits = _logits(spec, layout, work) if layout.pipeline_stages - 1 in stages else 0
    carried = work.accumulation > 1 or layout.pp > 1  # a batch before this one has left gradients
    begins, ends_with = kept + logits + (on_device if carried else 0), on_device + layer
    return Footprint(
        local_parameters=local,
        heaviest=rank,
        parameters=on_device,
        gradients=on_device,
        optimizer=on_device * 2,
        host=local[rank] * 4 * _FP32 if work.offloaded else 0,
        gathered=gathered,
        activations=kept + recomputed,
        logits=logits,
        working=round(_working(spec, layout, work)),
        never_at_once=on_device + kept + recomputed + logits - max(begins, ends_with),
        sent_fsdp=round(_sent_fsdp(held, sent_all, once, layout, work)),
        sent_tensor=round(_sent_tensor(spec, layout, work, stages)),
        sent_context=round(_sent_context(spec, layout, work, stages)),
        sent_pipeline=_sent_pipeline(spec, layout, work, stages),
        bubble=bubble(layout),
    )


def block_parameters(spec: ModelSpec) -> tuple[Parameter, ...]:
    """Every parameter of a block of the shape's family."""
    return _llama_block(spec) if isinstance(spec, LlamaSpec) else _gpt_neox_block(spec)


def _llama_block(spec: LlamaSpec) -> tuple[Parameter, ...]:
    d, a, k, f = spec.width, spec.attention_width, spec.kv_width, spec.mlp_width
    head_norms = ("attention.q_norm", "attention.k_norm") if spec.qk_norm else ()
    biases = (("q", a), ("k", k), ("v", k)) if spec.qkv_bias else ()
    return (
        ("attention_norm.weight", (d,), None),
        ("mlp_norm.weight", (d,), None),
        *((f"{norm}.weight", (spec.head_width,), None) for norm in head_norms),
        ("attention.q.weight", (a, d), 0),
        ("attention.k.weight", (k, d), 0),
        ("attention.v.weight", (k, d), 0),
        *((f"attention.{name}.bias", (width,), 0) for name, width in biases),
        ("attention.out.weight", (d, a), 1),
        ("mlp.gate.weight", (f, d), 0),
        ("mlp.up.weight", (f, d), 0),
        ("mlp.down.weight", (d, f), 1),
    )


def _gpt_neox_block(spec: ModelSpec) -> tuple[Parameter, ...]:
    d, f = spec.width, spec.mlp_width
    norms = [(f"{norm}.{part}", (d,), None) for norm in ("attention_norm", "mlp_norm") for part in ("weight", "bias")]
    return (
        *norms,
        ("attention.qkv.weight", (3 * d, d), 0),
        ("attention.qkv.bias", (3 * d,), 0),
        ("attention.out.weight", (d, d), 1),
        ("attention.out.bias", (d,), None),
        ("mlp.up.weight", (f, d), 0),
        ("mlp.up.bias", (f,), 0),
        ("mlp.down.weight", (d, f), 1),
        ("mlp.down.bias", (d,), None),
    )


def _stage_parameters(spec: ModelSpec, layout: ParallelDims, stage: int) -> Iterator[Parameter]:
    if stage == 0:
        yield "embedding.weight", (spec.vocab_size, spec.width), 0
    for layer in layout.layers_of(stage, spec.layers):
        for name, size, cut in block_parameters(spec):
            yield f"blocks.{layer}.{name}", size, cut
    if stage == layout.pipeline_stages - 1:
        yield "final_norm.weight", (spec.width,), None
        if not isinstance(spec, LlamaSpec):
            yield "final_norm.bias", (spec.width,), None
        if not spec.tied:
            yield "head.weight", (spec.vocab_size, spec.width), 0


def local_parameters(spec: ModelSpec, layout: ParallelDims, place: RankCoordinates) -> Iterator[tuple[str, int]]:
    """Name and count of what a rank keeps of each parameter: cut by TP, then by FSDP2 along the first dimension.

    FSDP2 cuts as `torch.chunk` does: equal pieces rounded up, so that the last ranks may hold less, or nothing.
    """
    over = layout.dp_shard * layout.cp
    index = place.shard * layout.cp + place.context
    for stage in layout.stages_of(place.pipeline):
        for name, size, cut in _stage_parameters(spec, layout, stage):
            count = _size(size) // (layout.tp if cut is not None else 1)
            rows = size[0] // (layout.tp if cut == 0 else 1)
            piece = -(-rows // over)
            mine = max(0, min(rows, (index + 1) * piece) - index * piece)
            yield name, count // rows * mine


def layer_activation_bytes(spec: ModelSpec, layout: ParallelDims, work: MemoryInputs) -> tuple[float, float]:
    """Bytes that autograd keeps of one layer and micro-batch: as checkpointing leaves them, and while it recomputes.

    Under "selective" by "op" the results of every second product and of attention are kept, besides the input.
    """
    per_token = _llama_token_bytes if isinstance(spec, LlamaSpec) else _gpt_neox_token_bytes
    whole, by_operator = (work.microbatch_tokens * size for size in per_token(spec, layout, work.bytes_per_number))
    entrance = work.microbatch_tokens * work.bytes_per_number * spec.width / layout.tp
    if work.recompute == "full":
        return entrance, whole
    if work.recompute == "selective" and work.selection == "op":
        return by_operator, whole
    if work.recompute == "selective":
        every = int(work.selection)
        return (entrance + (every - 1) * whole) / every, whole
    if work.recompute == "memory_budget":
        return entrance + work.memory_budget * (whole - entrance), whole
    return whole, 0.0


def _gpt_neox_token_bytes(spec: ModelSpec, layout: ParallelDims, number: int) -> tuple[float, float]:
    """Bytes kept of a token in a whole block, and under "op".

    Its input D/t; the gathered inputs of both halves 2 D; queries, keys and values 3 D/t and the rotated two once more
    2 D/t; attention's result D/t; the MLP before and after GELU 2 F/t. LayerNorm's and attention's statistics are in
    fp32. Per operator: the input, qkv's and up's results and attention's.
    """
    d, f, t = spec.width, spec.mlp_width, layout.tp
    statistics = (4 / t + spec.heads / t) * _FP32
    whole = number * (2 * d + 7 * d / t + 2 * f / t) + statistics
    return whole, number * (5 * d / t + f / t) + spec.heads / t * _FP32


def _llama_token_bytes(spec: ModelSpec, layout: ParallelDims, number: int) -> tuple[float, float]:
    """Bytes kept of a token in a whole block, and under "op".

    Both RMSNorms' inputs, before and after the division by the root, in fp32, 4 D/t (a kernel of one piece, as CUDA
    has, keeps half of that); the gathered inputs of both halves 2 D; rotated queries, rotated keys and values
    (A + 2 K)/t, each key repeated for its queries where attention takes a mask, and of all positions under context
    parallelism; attention's result A/t; the MLP's gate before and after SiLU, up and their product 4 F/t; twice the
    heads once more, in fp32, where they are normed. Per operator: the input, the results of q, v, gate and down (of all
    positions, as it comes before the sum over ranks) and attention's.
    """
    assert isinstance(spec, LlamaSpec), f"no Llama: {type(spec).__name__}"
    d, a, k, f, t = spec.width, spec.attention_width, spec.kv_width, spec.mlp_width, layout.tp
    statistics = (2 + spec.heads) / t * _FP32
    masked = layout.cp > 1 or spec.sliding_window is not None
    seen = layout.cp * 2 * (a if masked else k)
    normed = 4 * d + (2 * (a + k) if spec.qk_norm else 0)
    whole = number * (2 * d + (2 * a + seen + 4 * f) / t) + _FP32 * normed / t + statistics
    return whole, number * (d + (d + 2 * a + k + f) / t) + spec.heads / t * _FP32


def _activations(spec: ModelSpec, layout: ParallelDims, work: MemoryInputs, rank: int) -> tuple[int, int]:
    """What the layers keep until the backward pass, and one layer whole, as its backward pass needs it."""
    kept, recomputed = layer_activation_bytes(spec, layout, work)
    per_stage = spec.layers / layout.pipeline_stages
    return round(kept * per_stage * in_flight(layout, rank)), round(recomputed or kept)


def _working(spec: ModelSpec, layout: ParallelDims, work: MemoryInputs) -> float:
    """The MLP's gradients, before and after its activation, and the residual stream's on both sides: 2 F/t + 2 D."""
    return work.microbatch_tokens * work.bytes_per_number * (2 * spec.mlp_width / layout.tp + 2 * spec.width)


def _logits(spec: ModelSpec, layout: ParallelDims, work: MemoryInputs) -> int:
    """Logits and their gradient; under loss parallelism torch takes the softmax in fp32, besides.

    Where head and loss are one operation the gradient takes the place of the logits, of a chunk of tokens at a time,
    and the head's gradient is summed over the chunks in fp32.
    """
    rows = work.microbatch_tokens * spec.vocab_size
    if layout.tp == 1 and layout.pp == 1:
        chunks = -(-rows // LOGITS_CHUNK)
        head = spec.vocab_size * spec.width * (_FP32 + work.bytes_per_number) if chunks > 1 else 0
        return rows // chunks * work.bytes_per_number + head
    if layout.tp == 1 or not layout.loss_parallel:
        return rows * 2 * work.bytes_per_number
    return rows // layout.tp * (work.bytes_per_number + 2 * _FP32)


def _sent_fsdp(held: int, gathered: int, once: int, layout: ParallelDims, work: MemoryInputs) -> float:
    """Gathers, once or twice a local batch, and one sum of gradients; then the copies' sum (a ring sends it twice).

    Args:
        held: numbers of the rank's stages, whole.
        gathered: bytes of them when they are gathered.
        once: bytes of those that stay gathered until the backward pass.
    """
    over = layout.dp_shard * layout.cp
    share = (over - 1) / over
    gathers = 2 * gathered - once if layout.reshard_after_forward else gathered
    sent = share * (gathers + held * _FP32) * work.accumulation
    copies = (layout.dp_replicate - 1) / layout.dp_replicate
    return sent + 2 * held / over * _FP32 * copies * work.accumulation


def _gathered_once(spec: ModelSpec, layout: ParallelDims, stages: tuple[int, ...]) -> int:
    """What stays gathered between forward and backward: the head and its norm, tied to the embedding or not."""
    if layout.pipeline_stages - 1 not in stages:
        return 0
    parameters = _stage_parameters(spec, layout, layout.pipeline_stages - 1)
    ends = ("final_norm", "head", "embedding") if spec.tied else ("final_norm", "head")
    return _count_cut(tuple(parameter for parameter in parameters if parameter[0].startswith(ends)), layout.tp)


def _passes(layout: ParallelDims, work: MemoryInputs) -> int:
    return layout.microbatches * work.accumulation


def _sent_tensor(spec: ModelSpec, layout: ParallelDims, work: MemoryInputs, stages: tuple[int, ...]) -> float:
    """Two gathers and two sums over the positions a layer forward, as many backward, two more where recomputed."""
    moved = work.microbatch_tokens * spec.width * work.bytes_per_number * (layout.tp - 1) / layout.tp
    collectives = (8 + (4 if work.recompute == "full" else 0)) * len(_layers(spec, layout, stages))
    collectives += 2 * (0 in stages) + 2 * (layout.pipeline_stages - 1 in stages)
    return moved * collectives * _passes(layout, work)


def _sent_context(spec: ModelSpec, layout: ParallelDims, work: MemoryInputs, stages: tuple[int, ...]) -> float:
    """Keys and values of the other ranks, forward, and their gradients in fp32, backward."""
    forward = 2 if work.recompute == "full" else 1
    moved = 2 * work.microbatch_tokens * spec.kv_width / layout.tp * (forward * work.bytes_per_number + _FP32)
    return moved * (layout.cp - 1) * len(_layers(spec, layout, stages)) * _passes(layout, work)


def _sent_pipeline(spec: ModelSpec, layout: ParallelDims, work: MemoryInputs, stages: tuple[int, ...]) -> int:
    """The residual stream to the next stage and its gradient to the one before, unless they are on the same rank."""
    moved = work.microbatch_tokens * spec.width // layout.tp * work.bytes_per_number * _passes(layout, work)
    neighbours = [
        n for stage in stages for n in (stage - 1, stage + 1) if 0 <= n < layout.pipeline_stages and n not in stages
    ]
    return moved * len(neighbours)


def _layers(spec: ModelSpec, layout: ParallelDims, stages: tuple[int, ...]) -> list[int]:
    return [layer for stage in stages for layer in layout.layers_of(stage, spec.layers)]


def _unsharded(spec: ModelSpec, layout: ParallelDims, stage: int) -> int:
    return _count_cut(tuple(_stage_parameters(spec, layout, stage)), layout.tp)


def _gathered_bytes(parameters: tuple[Parameter, ...], layout: ParallelDims, work: MemoryInputs) -> int:
    """Bytes of parameters as FSDP2 gathers them: a byte a number where torchao casts them before."""
    total = 0
    for parameter in parameters:
        name, size, _ = parameter
        cast = work.float8_filter_fqns is not None and len(size) == 2
        cast = cast and in_float8(name, size, tp=layout.tp, filter_fqns=work.float8_filter_fqns or ())
        total += _count_cut((parameter,), layout.tp) * (1 if cast else work.bytes_per_number)
    return total


def _count_cut(parameters: tuple[Parameter, ...], tp: int) -> int:
    return sum(_size(size) // (tp if cut is not None else 1) for _, size, cut in parameters)


def _size(size: tuple[int, ...]) -> int:
    return size[0] * (size[1] if len(size) > 1 else 1)


def fits(costs: Footprint, device_bytes: int) -> bool:
    """Whether the memory worked out leaves the reserve free."""
    return costs.memory <= device_bytes * (1 - RESERVE)
