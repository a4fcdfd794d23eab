"""Which parameters each rank holds, and how many elements of them after tensor parallelism and FSDP2. No torch.

Exact: `titan-cpt plan --check-layout` compares the counts with the sharded model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from titan_cpt.common.weights.partition import Partition
from titan_cpt.distributed.float8_filter import in_float8
from titan_cpt.distributed.parallel_dims import ParallelDims, RankCoordinates
from titan_cpt.models.spec import ModelSpec, ParameterSpec
from titan_cpt.planning.parallel import MemoryInputs


def stage_parameters(spec: ModelSpec, dims: ParallelDims, stage: int) -> Iterator[ParameterSpec]:
    """Every parameter of a pipeline stage, by its name in the whole model."""
    if stage == 0:
        yield ParameterSpec("embedding.weight", (spec.vocab_size, spec.width), 0)
    for layer in dims.layers_of(stage, spec.layers):
        yield from block_parameters(spec, layer)
    if stage == dims.pipeline_stages - 1:
        yield from spec.final_norm_parameters()
        if not spec.tied:
            yield ParameterSpec("head.weight", (spec.vocab_size, spec.width), 0)


def block_parameters(spec: ModelSpec, layer: int) -> Iterator[ParameterSpec]:
    """Every parameter of one block, by its name in the whole model."""
    for name, size, tp_dim in spec.block_parameters():
        yield ParameterSpec(f"blocks.{layer}.{name}", size, tp_dim)


def stage_layers(spec: ModelSpec, dims: ParallelDims, stages: tuple[int, ...]) -> int:
    """Number of layers in some pipeline stages."""
    return sum(len(dims.layers_of(stage, spec.layers)) for stage in stages)


def local_parameters(spec: ModelSpec, dims: ParallelDims, coordinates: RankCoordinates) -> Iterator[tuple[str, int]]:
    """Name and local element count of each parameter of a rank: sharded by TP, then by FSDP2 over dimension 0.

    FSDP2 shards as `torch.chunk` does, in equal pieces rounded up, so that the last ranks may hold less or nothing.
    """
    shards = dims.dp_shard * dims.cp
    index = coordinates.shard * dims.cp + coordinates.context
    for stage in dims.stages_of(coordinates.pipeline):
        for parameter in stage_parameters(spec, dims, stage):
            rows = parameter.size[0] // (dims.tp if parameter.tp_dim == 0 else 1)
            chunk = -(-rows // shards)
            own_rows = max(0, min(rows, (index + 1) * chunk) - index * chunk)
            yield parameter.name, tp_count([parameter], dims.tp) // rows * own_rows


def tp_count(parameters: Iterable[ParameterSpec], tp: int) -> int:
    """Elements of these parameters on one tensor-parallel rank, before FSDP2 shards them."""
    return sum(parameter.elements // (tp if parameter.tp_dim is not None else 1) for parameter in parameters)


def muon_matrices(parameters: Iterable[ParameterSpec]) -> Iterator[ParameterSpec]:
    """Those of the parameters that Muon updates: the two-dimensional weights of the blocks."""
    return (each for each in parameters if each.name.startswith("blocks.") and len(each.size) == 2)


def lowest_trained_layer(spec: ModelSpec, partition: Partition) -> int:
    """The number of blocks below everything that is trained: no gradient is computed in these."""
    if partition.parts["embedding.weight"]:
        return 0
    trained = (any(partition.parts[each.name] for each in block_parameters(spec, n)) for n in range(spec.layers))
    return next((layer for layer, is_trained in enumerate(trained) if is_trained), spec.layers)


def frozen_flops(spec: ModelSpec, partition: Partition, spans: Sequence[float]) -> float:
    """Floating-point operations of training per token that frozen weights save, of those that `ModelSpec` counts.

    A matrix of N elements takes 2N operations in the forward pass, 2N for the gradient of its input and 2N for its own.
    A frozen one saves the last, and below everything that is trained also the second, as does attention there. A weight
    of which only rows are trained saves nothing: its whole gradient is computed.

    Args:
        spans: positions that a token attends to in each layer.
    """
    lowest = lowest_trained_layer(spec, partition)
    head = ParameterSpec("embedding.weight" if spec.tied else "head.weight", (spec.vocab_size, spec.width), 0)
    layers = [list(block_parameters(spec, layer)) for layer in range(spec.layers)]
    last = [*spec.final_norm_parameters()]
    frozen = sum(each.elements for layer in [*layers, last, [head]] for each in layer if not partition.parts[each.name])
    untouched = sum(each.elements for layer in layers[:lowest] for each in layer)
    if lowest == spec.layers:
        norm_is_trained = any(partition.parts[each.name] for each in last)
        untouched += 0 if norm_is_trained else head.elements + sum(each.elements for each in last)
    return 2 * (frozen + untouched) + 8 * spec.attention_width * sum(spans[:lowest])


def gathered_bytes(parameters: Iterable[ParameterSpec], dims: ParallelDims, inputs: MemoryInputs) -> int:
    """Bytes of these parameters when FSDP2 has all-gathered them: one byte per element if torchao casts them before."""
    total = 0
    for parameter in parameters:
        cast = inputs.float8_filter_fqns is not None and len(parameter.size) == 2
        cast = cast and in_float8(
            parameter.name,
            parameter.size,
            tp=dims.tp,
            filter_fqns=inputs.float8_filter_fqns or (),
            recipe="tensorwise",  # the only one whose weights are gathered in float8
        )
        total += tp_count([parameter], dims.tp) * (1 if cast else inputs.bytes_per_number)
    return total
