"""Activation checkpointing: full, selective (per operator or every n-th block), or torch.compile's memory budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.models.common.language_model import LanguageModel

_MATMULS = (
    "aten.mm.default",
    "aten.addmm.default",  # a linear layer with a bias
    "aten._scaled_mm.default",  # float8
    "mkldnn._linear_pointwise.default",  # training.enable_onednn
)
_SAVED_OPERATORS = {
    *_MATMULS,
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_attention_math.default",
    "titan_cpt.document_attention.default",
    "torch_attn._varlen_attn.default",
    "flex_attention",
    "_c10d_functional.reduce_scatter_tensor.default",  # saving is cheaper than communicating again
}
_RECOMPUTED_MATMULS = 2  # recompute every second matmul: half their memory for about a sixth more matmul FLOPs


def apply_ac(model: LanguageModel, options: ParallelOptions) -> None:
    """Save fewer activations and recompute the others in the backward pass.

    - "full" saves only the input of each block.
    - "selective" with selection "op" saves the outputs of attention and of every second matmul; with selection n it is
      "full" in every n-th block, and does not change the others.
    - "memory_budget" lets torch.compile choose what to save.
    """
    if options.recompute == "memory_budget":
        torch._functorch.config.activation_memory_budget = options.memory_budget
        return
    per_operator = options.recompute == "selective" and options.selection == "op"
    save_input = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if per_operator:
        save_input = partial(save_input, context_fn=_selective_contexts)
    every = int(options.selection) if options.recompute == "selective" and not per_operator else 1
    for layer, block in list(model.blocks.items()):
        if int(layer) % every == 0:
            model.blocks[layer] = checkpoint_wrapper(block, checkpoint_fn=_checkpoint_if_trained, save_input=save_input)


def _checkpoint_if_trained(
    block: nn.Module, x_BLD: Tensor, *, save_input: Callable[..., Tensor], **documents: object
) -> Tensor:
    """The checkpointed block; or the block itself, if it is frozen and its input needs no gradient.

    Without a backward pass nothing is saved, and torch.compile (2.13) refuses to compile a checkpoint.
    """
    if x_BLD.requires_grad or any(weight.requires_grad for weight in block.parameters()):
        return save_input(block, x_BLD, **documents)
    out_BLD: Tensor = block(x_BLD, **documents)
    return out_BLD


def _selective_contexts() -> object:
    """The contexts of a block's forward pass and of its recomputation; each counts its own matmuls."""
    matmuls = {False: 0, True: 0}

    def policy(context: object, operator: object, *_: object, **__: object) -> CheckpointPolicy:
        name = str(operator)
        if name in _MATMULS:
            recomputing = bool(getattr(context, "is_recompute", False))
            matmuls[recomputing] += 1
            if matmuls[recomputing] % _RECOMPUTED_MATMULS == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if name in _SAVED_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
