"""How a plain model is laid over the ranks, from outside: a line for each technique, in torchtitan's order.

Shape letters: B sequences, L positions, D width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from titan_cpt.distributed.context_parallel import ContextParallelAttention, RingAttention
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.float8 import convert_layers
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.models.build import LanguageModel
from titan_cpt.models.gpt_neox import model as gpt_neox
from titan_cpt.models.llama import model as llama
from titan_cpt.models.llama.model import Llama, TiedHead

_KEPT_OPERATORS = (
    "aten.mm.default",
    "aten.addmm.default",  # a linear layer with a bias
    "aten._scaled_mm.default",  # a product in float8
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_attention_math.default",
    "_c10d_functional.reduce_scatter_tensor.default",  # cheaper to keep than to send again
)
_RECOMPUTED_PRODUCTS = 2  # of the products, every second one is computed again: half the memory for a sixth of the work


def parallelize(model: LanguageModel, mesh: Mesh, parallel_options: ParallelOptions) -> None:
    """Lay a model, or the stage of a pipeline, over the ranks; in place, its parameters keep their names.

    A single process is neither split nor sharded. Names: DCP and `get_model_state_dict` leave out the prefixes of the
    wrappers that checkpointing and compiling put around blocks.
    """
    if parallel_options.float8 is not None:
        emulated, sharded = mesh.process.device.type == "cpu", mesh.device_mesh is not None
        convert_layers(model, parallel_options.float8, tp=mesh.parallel_dims.tp, sharded=sharded, emulated=emulated)
    if mesh.parallel_dims.tp > 1:
        apply_tp(model, mesh.tensor, loss_parallel=mesh.parallel_dims.loss_parallel)
    if mesh.context is not None:
        apply_cp(model, mesh.context, ring=parallel_options.ring_attention)
    if parallel_options.recompute != "none":
        apply_ac(model, parallel_options)
    if parallel_options.compiled:
        apply_compile(model)
    if parallel_options.async_tp:
        enable_async_tp(mesh.tensor)
    if mesh.device_mesh is not None:
        apply_fsdp(model, mesh, parallel_options.precision, offloaded=parallel_options.offloaded)


def apply_tp(model: LanguageModel, tensor: DeviceMesh, *, loss_parallel: bool) -> None:
    """Tensor and sequence parallelism: columns, then rows; between them the residual stream is split over positions.

    Sequence parallelism is not an option: without it the norms' weights would stay plain tensors beside DTensors, and
    no gradient norm spans both. Source: Korthikanti et al. 2022, arXiv:2205.05198.
    """
    positions, whole = Shard(1), Replicate()
    logits: Shard | Replicate = Shard(-1) if loss_parallel else whole
    head: ParallelStyle = ColwiseParallel(
        input_layouts=positions, output_layouts=logits, use_local_output=not loss_parallel
    )
    if isinstance(model.head, TiedHead):  # its second input is the embedding's weight, rows of which lie here already
        head = PrepareModuleInputOutput(
            input_layouts=(positions, None),
            desired_input_layouts=(whole, None),
            output_layouts=Shard(-1),
            desired_output_layouts=logits,
            use_local_output=not loss_parallel,
        )
    ends = {
        "embedding": RowwiseParallel(input_layouts=whole, output_layouts=positions),
        "final_norm": SequenceParallel(),
        "head": head,
    }
    parallelize_module(model, tensor, {name: plan for name, plan in ends.items() if getattr(model, name) is not None})
    for block in model.blocks.values():
        plan = _llama_block(cast(llama.Block, block)) if isinstance(model, Llama) else _gpt_neox_block()
        parallelize_module(block, tensor, plan)


def _gpt_neox_block() -> dict[str, ParallelStyle]:
    """How a GPT-NeoX block is split."""
    positions, whole = Shard(1), Replicate()
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(positions,), desired_input_layouts=(whole,)),
        "attention.qkv": ColwiseParallel(),  # its rows lie head after head: a slice holds whole heads
        "attention.out": RowwiseParallel(output_layouts=positions),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(positions,), desired_input_layouts=(whole,)),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=positions),
    }


def _llama_block(block: llama.Block) -> dict[str, ParallelStyle]:
    """How a Llama block is split.

    The norms of queries and keys see q_BLNH, whose heads lie on several ranks: they are "sequence parallel" over
    dimension 2, which makes their weights DTensors, held by all, and sums the ranks' gradients.
    """
    positions, whole = Shard(1), Replicate()
    head_norms = ("attention.q_norm", "attention.k_norm") if block.attention.q_norm is not None else ()
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(positions,), desired_input_layouts=(whole,)),
        "attention.q": ColwiseParallel(),  # the rows of all three lie head after head: a slice holds whole heads
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        **{name: SequenceParallel(sequence_dim=2, use_local_output=True) for name in head_norms},
        "attention.out": RowwiseParallel(output_layouts=positions),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(positions,), desired_input_layouts=(whole,)),
        "mlp.gate": ColwiseParallel(),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=positions),
    }


def apply_cp(model: LanguageModel, context: torch.distributed.ProcessGroup, *, ring: bool) -> None:
    """Context parallelism: every block's attention gathers the other ranks' keys and values, or lets them go round."""
    mesh = DeviceMesh.from_group(context, "cuda") if ring else None
    for block in model.blocks.values():
        attention = cast(gpt_neox.Block | llama.Block, block).attention
        core: nn.Module = (
            ContextParallelAttention(attention.core, context) if mesh is None else RingAttention(attention.core, mesh)
        )
        attention.core = core  # type: ignore[assignment]


def apply_ac(model: LanguageModel, parallel_options: ParallelOptions) -> None:
    """Keep less for the backward pass and compute it again there.

    "full" keeps a block's input alone; "selective" by "op" keeps attention and every second product, by n treats every
    n-th block as "full" does; "memory_budget" leaves the choice to torch.compile.
    """
    if parallel_options.recompute == "memory_budget":
        torch._functorch.config.activation_memory_budget = parallel_options.memory_budget
        return
    by_operator = parallel_options.recompute == "selective" and parallel_options.selection == "op"
    every = int(parallel_options.selection) if parallel_options.recompute == "selective" and not by_operator else 1
    for layer, block in list(model.blocks.items()):
        if int(layer) % every == 0:
            wrap = partial(checkpoint_wrapper, context_fn=_selective_contexts) if by_operator else checkpoint_wrapper
            model.blocks[layer] = wrap(block, preserve_rng_state=False)


def _selective_contexts() -> object:
    """The contexts of one forward pass and its recomputation; products are counted apart in the two."""
    kept = set(_KEPT_OPERATORS)
    products = {False: 0, True: 0}

    def policy(context: object, operator: object, *_: object, **__: object) -> CheckpointPolicy:
        name = str(operator)
        if name in ("aten.mm.default", "aten.addmm.default", "aten._scaled_mm.default"):
            recomputing = bool(getattr(context, "is_recompute", False))
            products[recomputing] += 1
            if products[recomputing] % _RECOMPUTED_PRODUCTS == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if name in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def apply_compile(model: LanguageModel) -> None:
    """torch.compile, block by block: all blocks share one piece of generated code."""
    for layer, block in list(model.blocks.items()):
        model.blocks[layer] = cast(nn.Module, torch.compile(block))


def enable_async_tp(tensor: DeviceMesh) -> None:
    """Async TP: torch.compile cuts gathers and products into pieces and sends one while it multiplies the next.

    Through symmetric memory, which CUDA has. Never run by us: no GPU was at hand.
    """
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group  # not in every build of torch

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(tensor.get_group().group_name)


def apply_fsdp(model: LanguageModel, mesh: Mesh, precision: torch.dtype, *, offloaded: bool) -> None:
    """FSDP2: shard every block by itself, then the embedding, then the head with its norm; HSDP over two dimensions.

    A tied embedding is both ends of the model, so it belongs to the root, which stays gathered from the first forward
    to the end of the backward pass: the head reads its weight without calling it. Over a single rank nothing is
    sharded, but parameters and activations are cast to the precision all the same.
    """
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    # Pinned memory is CUDA's; on a CPU the parameters are where they would be anyway.
    kept = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offloaded else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh.fsdp, mp_policy=policy, offload_policy=kept)
    reshard = mesh.parallel_dims.reshard_after_forward
    tied = isinstance(model.head, TiedHead)
    if model.embedding is not None and not tied:
        shard(model.embedding, reshard_after_forward=reshard)
    for block in model.blocks.values():
        shard(block, reshard_after_forward=reshard)
    last = [module for module in (model.final_norm, model.head) if module is not None and not tied]
    if last:
        shard(last, reshard_after_forward=False)  # the backward pass begins with them
    shard(model, reshard_after_forward=reshard and not tied)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already a share of the global batch's mean: sum gradients over ranks, do not average them.
            module.set_gradient_divide_factor(1.0)
            if mesh.process.device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
