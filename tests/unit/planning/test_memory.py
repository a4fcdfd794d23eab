"""What the plan says of memory, held against what torch does."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallel_dims import ParallelDims, RankCoordinates
from titan_cpt.distributed.parallelize import parallelize
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.memory import footprint, layer_activation_bytes
from titan_cpt.planning.parallel import MemoryInputs
from titan_cpt.planning.sharding import local_parameters

SPEC = named_size("gpt_neox", "debug", 257, {"layers": 4, "width": 128, "heads": 4, "mlp_width": 512})
LLAMA_NUMBERS = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "mlp_width": 384}
LLAMAS = {
    "llama": named_size("llama", "debug", 257, LLAMA_NUMBERS),
    "ungrouped": named_size("llama", "debug", 257, {**LLAMA_NUMBERS, "kv_heads": 4, "mlp_width": 512}),
    "qwen2": named_size("llama", "debug", 257, {**LLAMA_NUMBERS, "qkv_bias": True}),
    "qwen3": named_size("llama", "debug", 257, {**LLAMA_NUMBERS, "qk_norm": True, "head_width": 48}),
    "windowed": named_size("llama", "debug", 257, {**LLAMA_NUMBERS, "sliding_window": 16}),
    "tied": named_size("llama", "debug", 257, {**LLAMA_NUMBERS, "tie_embeddings": True}),
}
WORK = MemoryInputs(
    microbatch_tokens=256,
    accumulation=1,
    bytes_per_number=4,
    recompute="none",
    selection="op",
    memory_budget=0.5,
)


def kept_between_layers(spec: ModelSpec, recompute: str, selection: str) -> int:
    """Bytes of all tensors, other than parameters, that a model keeps for its backward pass: 4 sequences of 64."""
    model = build_model(spec)
    model.init_weights(0)
    mesh = Mesh(ProcessInfo(0, 1, torch.device("cpu")), ParallelDims(), ParallelDims().coordinates(0), 0, None, None)
    parallelize(model, mesh, ParallelOptions(torch.float32, recompute=recompute, selection=selection))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(torch.zeros(4, 64, dtype=torch.int64))
    assert logits.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("recompute", "selection"), [("none", "op"), ("full", "op"), ("selective", "2")])
@pytest.mark.parametrize("spec", [SPEC, *LLAMAS.values()], ids=["gpt_neox", *LLAMAS])
def test_activations_are_what_autograd_saves(spec: ModelSpec, recompute: str, selection: str) -> None:
    """Two depths apart, so that embedding and head cancel out: within 15 %, the promise of the plan."""
    deep = dataclasses.replace(spec, layers=8)
    saved = kept_between_layers(deep, recompute, selection) - kept_between_layers(spec, recompute, selection)
    work = dataclasses.replace(WORK, recompute=recompute, selection=selection)
    planned, _ = layer_activation_bytes(spec, ParallelDims(), work)

    assert saved / 4 == pytest.approx(planned, rel=0.15)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelDims(dp_shard=3),
        ParallelDims(dp_shard=5, tp=2),
        ParallelDims(dp_shard=2, cp=2, tp=4, pp=2, schedule="1F1B"),
        ParallelDims(dp_shard=3, pp=2, schedule="ZBVZeroBubble"),
    ],
)
def test_the_ranks_hold_every_parameter_once(layout: ParallelDims) -> None:
    """Over all ranks of one copy the pieces add up to the model, what tensor-parallel ranks hold in common aside."""
    total = common = 0
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        for name, count in local_parameters(SPEC, layout, place):
            copied = "norm" in name or name.endswith(("out.bias", "down.bias"))
            total += 0 if copied and place.tensor else count
            common += count if copied and place.tensor else 0

    assert total == SPEC.parameters
    assert (common > 0) == (layout.tp > 1)


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("layout", [ParallelDims(), ParallelDims(dp_shard=5), ParallelDims(dp_shard=3, tp=2)])
def test_the_ranks_hold_every_parameter_of_a_llama_once(name: str, layout: ParallelDims) -> None:
    """By the built model's names and shapes; norms are held by every tensor-parallel rank, all else is cut."""
    spec = LLAMAS[name]
    with torch.device("meta"):
        expected = {name: parameter.numel() for name, parameter in build_model(spec).named_parameters()}
    held = dict.fromkeys(expected, 0)
    for rank in range(layout.world_size):
        for name, count in local_parameters(spec, layout, layout.coordinates(rank)):
            held[name] += count

    assert held == {name: count * (layout.tp if "norm" in name else 1) for name, count in expected.items()}


def test_a_rank_without_peers_holds_the_model_and_its_moments() -> None:
    """float32 weights, gradients and two moments: 16 bytes a parameter."""
    costs = footprint(SPEC, ParallelDims(), WORK)

    assert costs.parameters + costs.gradients + costs.optimizer == 16 * SPEC.parameters
    assert costs.traffic.total == 0


def test_what_is_held_at_once_by_hand() -> None:
    """Gradients come as activations go: all activations and no gradient, or all gradients and one layer's activations.

    Where a batch before has left gradients, all of them lie beside all activations.
    """
    once = footprint(SPEC, ParallelDims(), WORK)
    again = footprint(SPEC, ParallelDims(), dataclasses.replace(WORK, accumulation=2))
    fixed = once.parameters + once.optimizer + once.working
    layer, _ = layer_activation_bytes(SPEC, ParallelDims(), WORK)

    assert once.working == 256 * 4 * (2 * 512 + 2 * 128)
    assert once.memory - fixed == max(once.activations + once.logits, once.gradients + round(layer))
    assert again.memory - fixed == once.activations + once.logits + once.gradients


def test_fsdp_sends_what_a_ring_sends() -> None:
    """Over 4 ranks 3/4 of the model in float32: gathered twice and summed once, the head and its norm gathered once."""
    costs = footprint(SPEC, ParallelDims(dp_shard=4), WORK)
    head = SPEC.vocab_size * SPEC.width + 2 * SPEC.width

    assert costs.traffic.fsdp == round(0.75 * 4 * (3 * SPEC.parameters - head))


def test_place_and_rank_follow_each_other() -> None:
    """Tensor places run fastest, pipeline places slowest; tensor and context ranks share their data."""
    layout = ParallelDims(dp_replicate=2, dp_shard=3, cp=2, tp=2, pp=2, schedule="1F1B")

    assert layout.coordinates(0) == RankCoordinates(0, 0, 0, 0, 0)
    assert layout.coordinates(1) == RankCoordinates(0, 0, 0, 0, 1)
    assert layout.coordinates(2) == RankCoordinates(0, 0, 0, 1, 0)
    assert layout.coordinates(4) == RankCoordinates(0, 0, 1, 0, 0)
    assert layout.coordinates(12) == RankCoordinates(0, 1, 0, 0, 0)
    assert layout.coordinates(24) == RankCoordinates(1, 0, 0, 0, 0)
    assert [layout.data_rank(rank) for rank in (0, 3, 4, 12, 23, 24)] == [0, 0, 1, 3, 5, 0]
