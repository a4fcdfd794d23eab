"""The estimated memory of a rank, compared with what torch saves, and by hand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from titan_cpt.common.weights.partition import Partition, make_partition
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.distributed.parallelize import freeze, parallelize
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size
from titan_cpt.models.spec import ModelSpec
from titan_cpt.planning.memory import footprint, layer_activation_bytes
from titan_cpt.planning.parallel import MemoryInputs
from titan_cpt.planning.plan import OptimizerHyperparameters
from titan_cpt.planning.sharding import frozen_flops
from titan_cpt.planning.stages.partition import weight_sizes
from titan_cpt.training.optimization.adamw import build_adamw
from titan_cpt.training.optimization.trained_weights import TrainedWeights

SPEC = named_size("gpt_neox", "debug", 257, {"layers": 4, "width": 128, "heads": 4, "mlp_width": 512})
SEQUENTIAL = dataclasses.replace(SPEC, parallel_residual=False)
LLAMA_NUMBERS = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "mlp_width": 384}
LLAMAS = {
    "llama": named_size("llama", "debug", 257, LLAMA_NUMBERS),
    "ungrouped": named_size("llama", "debug", 257, {**LLAMA_NUMBERS, "kv_heads": 4, "mlp_width": 512}),
    "qwen2": named_size("llama", "debug", 257, {**LLAMA_NUMBERS, "qkv_bias": True}),
    "qwen3": named_size("llama", "debug", 257, {**LLAMA_NUMBERS, "qk_norm": True, "head_width": 48}),
    "windowed": named_size("llama", "debug", 257, {**LLAMA_NUMBERS, "sliding_window": 16}),
    "tied": named_size("llama", "debug", 257, {**LLAMA_NUMBERS, "tie_embeddings": True}),
    "olmo3": named_size("olmo", "debug", 257, {**LLAMA_NUMBERS, "sliding_window": 16, "global_interval": 2}),
    "gemma3": named_size("gemma3", "debug", 257, {**LLAMA_NUMBERS, "head_width": 48, "global_interval": 2}),
}
WORK = MemoryInputs(
    microbatch_tokens=256,
    accumulation=1,
    bytes_per_number=4,
    recompute="none",
    selection="op",
    memory_budget=0.5,
)


def saved_for_backward(
    spec: ModelSpec,
    recompute: str = "none",
    selection: str = "op",
    *,
    compiled_in: torch.dtype | None = None,
    trained: list[str] | None = None,
) -> int:
    """Bytes of all tensors except parameters that autograd saves for the backward pass: 4 sequences of 64.

    `compiled_in`: the dtype of the weights, with compiled blocks.
    """
    model = build_model(spec)
    model.init_weights(0)
    mesh = Mesh(ProcessInfo(0, 1, torch.device("cpu")), ParallelDims(), ParallelDims().coordinates(0), 0, None, None)
    parallelize(model, mesh, ParallelOptions(torch.float32, recompute=recompute, selection=selection))
    freeze([model], trained)
    if compiled_in is not None:
        model.to(compiled_in)
        for block in model.blocks.values():
            block.compile(
                backend="aot_eager_decomp_partition"
            )  # Inductor's choice of what to save, without its kernels
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved_storages: dict[int, torch.UntypedStorage] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved_storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        logits = model(torch.zeros(4, 64, dtype=torch.int64))
    assert logits.requires_grad
    return sum(storage.nbytes() for storage in saved_storages.values())


@pytest.mark.parametrize(("recompute", "selection"), [("none", "op"), ("full", "op"), ("selective", "2")])
@pytest.mark.parametrize("spec", [SPEC, SEQUENTIAL, *LLAMAS.values()], ids=["gpt_neox", "sequential", *LLAMAS])
def test_activations_are_what_autograd_saves(spec: ModelSpec, recompute: str, selection: str) -> None:
    """The difference of two depths, so that embedding and head cancel out; within 15 %."""
    deep = dataclasses.replace(spec, layers=8)
    saved = saved_for_backward(deep, recompute, selection) - saved_for_backward(spec, recompute, selection)
    work = dataclasses.replace(WORK, recompute=recompute, selection=selection)
    planned, _ = layer_activation_bytes(spec, ParallelDims(), work)

    assert saved / 4 == pytest.approx(planned, rel=0.15)


@pytest.mark.filterwarnings("ignore")  # those of the compiler's own code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt_neox", "sequential", "llama", "qwen3", "windowed", "olmo3", "gemma3"])
def test_activations_of_compiled_blocks_are_what_torch_compile_saves(name: str, dtype: torch.dtype) -> None:
    """The difference of two depths, within 2 %.

    On a CPU two things are added: attention saves queries, keys, values and output in float32, and its output once more
    in the order in which `out` reads it.
    """
    spec = {"gpt_neox": SPEC, "sequential": SEQUENTIAL, **LLAMAS}[name]
    torch._dynamo.reset()
    saved = saved_for_backward(dataclasses.replace(spec, layers=3), compiled_in=dtype)
    saved -= saved_for_backward(dataclasses.replace(spec, layers=1), compiled_in=dtype)
    work = dataclasses.replace(WORK, bytes_per_number=dtype.itemsize, compiled=True)
    planned, _ = layer_activation_bytes(spec, ParallelDims(), work)
    queries, masked = spec.attention_width, spec.windowed_share
    keys = masked * queries + (1 - masked) * spec.kv_width
    on_a_cpu = (4 - dtype.itemsize) * (2 * queries + 2 * keys) + dtype.itemsize * queries

    assert saved / 2 == pytest.approx(planned + 256 * on_a_cpu, rel=0.02)


def test_a_single_process_holds_weights_gradients_and_two_moments() -> None:
    """In float32: 16 bytes per parameter, and nothing is sent."""
    costs = footprint(SPEC, ParallelDims(), WORK)

    assert costs.parameters + costs.gradients + costs.optimizer == 16 * SPEC.parameters
    assert costs.traffic.total == 0


def test_muon_holds_one_moment_for_the_matrices_of_the_blocks() -> None:
    """4 bytes less for each; whole matrices exist while activations do not, so they add nothing to this peak."""
    adamw, muon = (footprint(SPEC, ParallelDims(), dataclasses.replace(WORK, muon=muon)) for muon in (False, True))
    matrices = 4 * (3 * 128 * 128 + 128 * 128 + 2 * 128 * 512)

    assert adamw.optimizer - muon.optimizer == 4 * matrices
    assert adamw.orthogonalization == 0
    assert muon.orthogonalization == (2 * 4 + 2) * 128 * 512
    assert adamw.memory - muon.memory == 4 * matrices


def test_muons_whole_matrices_count_where_they_need_more_than_the_backward_pass() -> None:
    """A batch of one token: state and gradients, and the largest matrix."""
    costs = footprint(SPEC, ParallelDims(), dataclasses.replace(WORK, microbatch_tokens=1, muon=True))

    assert costs.memory >= costs.parameters + costs.optimizer + costs.gathered + costs.orthogonalization


def test_peak_memory_by_hand() -> None:
    """The larger of all activations, and all gradients with one layer's activations.

    With gradient accumulation, the gradients of the previous local batch add to all activations.
    """
    once = footprint(SPEC, ParallelDims(), WORK)
    again = footprint(SPEC, ParallelDims(), dataclasses.replace(WORK, accumulation=2))
    fixed = once.parameters + once.optimizer + once.working
    layer, _ = layer_activation_bytes(SPEC, ParallelDims(), WORK)

    assert once.working == 256 * 4 * (2 * 512 + 2 * 128)
    assert once.memory - fixed == max(once.activations + once.logits, once.gradients + round(layer))
    assert again.memory - fixed == once.activations + once.logits + once.gradients


def test_cpu_offload_moves_weights_gradients_and_optimizer_to_host_memory() -> None:
    """16 bytes per parameter; all-gathered parameters stay on the device."""
    on_device = footprint(SPEC, ParallelDims(dp_shard=2), WORK)
    offloaded = footprint(SPEC, ParallelDims(dp_shard=2), dataclasses.replace(WORK, offloaded=True))

    assert offloaded.host == on_device.parameters + on_device.gradients + on_device.optimizer
    assert offloaded.parameters == offloaded.gradients == offloaded.optimizer == on_device.host == 0
    assert offloaded.gathered == on_device.gathered


def test_bf16_gradients_take_half_except_the_heads() -> None:
    """With the Triton optimizer and one micro-batch a step."""
    in_float32 = footprint(SPEC, ParallelDims(), WORK)
    halved = footprint(SPEC, ParallelDims(), dataclasses.replace(WORK, gradient_bytes=2))
    head = SPEC.vocab_size * SPEC.width

    assert in_float32.gradients - halved.gradients == 2 * (in_float32.local_parameters[0] - head)
    assert (halved.parameters, halved.optimizer) == (in_float32.parameters, in_float32.optimizer)


def test_a_large_gpu_computes_the_logits_in_fewer_chunks() -> None:
    """824 million logits of 405M parameters: 13 chunks on a CPU, 4 on 80 GiB, where the head has no bf16 share."""
    spec = named_size("gpt_neox", "410m", 50_304)
    inputs = dataclasses.replace(WORK, microbatch_tokens=8 * 2048, bytes_per_number=2)
    on_cpu, on_gpu = (
        footprint(spec, ParallelDims(), dataclasses.replace(inputs, gpu_bytes=gpu_bytes)).logits
        for gpu_bytes in (None, 80 * 2**30)
    )
    logits, head = 8 * 2048 * 50_304, 50_304 * 1024

    assert on_cpu == logits // 13 * 2 + head * 6
    assert on_gpu == logits // 4 * 2 + head * 4


# Measured when attention kept all of qkv, two more tensors of the width per layer and token.
PAPER = (named_size("gpt_neox", "405m", 50_304), 8 * 2048, 19.6 - 24 * 8 * 2048 * 2 * 1024 * 2 / 2**30)
NUMBERS_1B = {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "mlp_width": 5632}
SPEC_1B = named_size("llama", "debug", 32_000, NUMBERS_1B)


@pytest.mark.parametrize(
    ("spec", "microbatch_tokens", "measured_gib", "compiled"),
    [(*PAPER, False), (*PAPER, True), (SPEC_1B, 4 * 2048, 29.2, False), (SPEC_1B, 4 * 2048, 26.0, True)],
    ids=["405M", "405M compiled", "1.1B", "1.1B compiled"],
)
def test_the_estimate_is_within_ten_percent_of_an_h200s_peak(
    spec: ModelSpec, microbatch_tokens: int, measured_gib: float, compiled: bool
) -> None:
    """The four peaks of docs/performance_gpu.md."""
    work = dataclasses.replace(WORK, microbatch_tokens=microbatch_tokens, bytes_per_number=2, compiled=compiled)

    assert footprint(spec, ParallelDims(), work).memory / 2**30 == pytest.approx(measured_gib, rel=0.1)


def partition_of(spec: ModelSpec, trainable: list[str], first_new_row: int | None = None) -> Partition:
    return make_partition(weight_sizes(spec), trainable=trainable, lr_scale=None, first_new_row=first_new_row)


@pytest.mark.parametrize(
    "trainable", [["embedding", "head"], ["embedding.new", "head.new"], ["blocks.2", "blocks.3.mlp"], ["head"]]
)
def test_gradients_and_moments_of_what_is_trained_are_those_that_a_step_allocates(trainable: list[str]) -> None:
    """The real optimizer after a backward pass; where rows are trained, moments of these rows and a whole gradient."""
    partition = partition_of(SPEC, trainable, first_new_row=200)
    costs = footprint(SPEC, ParallelDims(), dataclasses.replace(WORK, partition=partition))
    model = build_model(SPEC)
    model.init_weights(0)
    numbers = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = build_adamw(model, lr=0.0, **numbers)
    hyperparameters = OptimizerHyperparameters(muon=None, **numbers)
    TrainedWeights(model, optimizer).use(SimpleNamespace(partition=partition, optimizer=hyperparameters))
    model(torch.zeros(4, 64, dtype=torch.int64)).mean().backward()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]

    assert costs.parameters == 4 * SPEC.parameters
    assert costs.gradients == sum(4 * weight.grad.numel() for weight in model.parameters() if weight.grad is not None)
    assert costs.optimizer == sum(4 * moment.numel() for moment in moments)


@pytest.mark.parametrize(("trainable", "layers"), [(["head"], 0), (["blocks.2", "head"], 2), (["embedding"], 4)])
def test_blocks_below_everything_that_is_trained_save_no_activations(trainable: list[str], layers: int) -> None:
    """As many blocks are planned as autograd saves something for; frozen ones above a trained one save less."""
    partition = partition_of(SPEC, trainable)
    planned = footprint(SPEC, ParallelDims(), dataclasses.replace(WORK, partition=partition)).activations
    each, _ = layer_activation_bytes(SPEC, ParallelDims(), WORK)
    names = [name for name, parts in partition.parts.items() if parts]
    saved = saved_for_backward(SPEC, trained=names)

    assert planned == round(layers * each)
    assert saved <= planned + 3 * 256 * 4 * SPEC.width
    assert saved >= 0.6 * planned


def test_frozen_weights_are_not_orthogonalized() -> None:
    """Muon needs no whole matrix where all matrices are frozen."""
    partition = partition_of(SPEC, ["embedding", "head"])
    costs = footprint(SPEC, ParallelDims(), dataclasses.replace(WORK, muon=True, partition=partition))

    assert costs.orthogonalization == 0
    assert costs.optimizer == 2 * 4 * 2 * SPEC.embedding_parameters


@pytest.mark.parametrize("trainable", [["embedding", "head"], ["blocks.2"], ["head"], ["final_norm"]])
@pytest.mark.parametrize("spec", [SPEC, LLAMAS["llama"]], ids=["gpt_neox", "llama"])
def test_operations_that_frozen_weights_save_are_those_that_torch_counts(spec: ModelSpec, trainable: list[str]) -> None:
    """Matrix products, forward and backward, with and without frozen weights; vectors are 1 % of the formula's N."""
    counts = []
    partition = partition_of(spec, trainable)
    for names in (None, [name for name, parts in partition.parts.items() if parts]):
        model = build_model(spec)
        model.init_weights(0)
        freeze([model], names)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(4, 64, dtype=torch.int64)).mean().backward()
        counts.append(counter.get_total_flops() / 256)

    assert frozen_flops(spec, partition, [0] * spec.layers) == pytest.approx(counts[0] - counts[1], rel=0.02)


def test_attention_below_everything_that_is_trained_has_no_backward_pass() -> None:
    """8 of its 12 operations for each position and feature, in the 2 blocks below; spans of a mask count as given."""
    partition = partition_of(SPEC, ["blocks.2"])
    without = frozen_flops(SPEC, partition, [0.0] * SPEC.layers)

    assert frozen_flops(SPEC, partition, [64] * SPEC.layers) - without == 2 * 8 * 64 * SPEC.attention_width
    assert (
        frozen_flops(SPEC, partition, [3.0, 17.0, *[64] * (SPEC.layers - 2)]) - without
        == 8 * (3 + 17) * SPEC.attention_width
    )
