"""Apply all parallelism techniques to a model, in torchtitan's order. Each technique has its own file."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn
from torch.distributed.fsdp import FSDPModule

from titan_cpt.distributed.activation_checkpoint import apply_ac
from titan_cpt.distributed.compile import apply_compile
from titan_cpt.distributed.context_parallel import apply_cp
from titan_cpt.distributed.device_mesh import Mesh
from titan_cpt.distributed.float8 import convert_layers
from titan_cpt.distributed.fsdp import apply_fsdp
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.tensor_parallel import apply_tp, enable_async_tp
from titan_cpt.models.common.language_model import LanguageModel


def parallelize(model: LanguageModel, mesh: Mesh, options: ParallelOptions) -> None:
    """Parallelize a model, or one of its pipeline stages, in place. FSDP2 is not applied in a single process.

    Parameter names in checkpoints do not change: `get_model_state_dict` removes the prefixes that activation
    checkpointing and torch.compile add.
    """
    dims = mesh.parallel_dims
    if options.float8 is not None:
        emulated = mesh.process.device.type == "cpu"
        sharded = mesh.device_mesh is not None
        convert_layers(model, options.float8, tp=dims.tp, sharded=sharded, emulated=emulated)
    if dims.tp > 1:
        apply_tp(model, mesh.tensor, loss_parallel=dims.loss_parallel)
    if mesh.context is not None:
        apply_cp(model, mesh.context, ring=options.ring_attention)
    if options.recompute != "none":
        apply_ac(model, options)
    if options.compiled:
        apply_compile(model, options)
    if options.async_tp:
        enable_async_tp(mesh.tensor)
    if mesh.device_mesh is not None:
        apply_fsdp(model, mesh, options.precision, offloaded=options.offloaded)


def freeze(models: Iterable[nn.Module], trained: Collection[str] | None) -> None:
    """Compute gradients of these weights only, from the next forward pass on; collective under FSDP2.

    No gradient of a frozen weight is computed, reduced or kept, and layers save nothing for it. Gradients of the
    activations are computed as far as a trained weight needs them.

    Args:
        models: the module of the weights and those whose forward and backward pass run; they may share weights.
        trained: names of the weights in the whole model; None for all.
    """
    for model in models:
        sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.reshard()  # the module's parameters may be gathered ones, made anew in each forward pass
        for name, weight in model.named_parameters():
            weight.requires_grad_(trained is None or plain_name(name) in trained)
        for module in sharded:
            # FSDP2 (2.13) looks once at which weights are trained to choose the dtypes in which it reduces gradients,
            # and chooses none for a group without. This call makes it look again.
            module.unshard()
            module.reshard()


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes that activation checkpointing and torch.compile add."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
