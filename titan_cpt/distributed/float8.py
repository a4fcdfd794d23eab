"""Float8 training of linear layers with torchao: conversion, scales, and FSDP2 all-gather in float8.

Master weights and optimizer moments stay in float32. A converted layer casts its input, its weight and its output's
gradient to float8 for its three matrix products (output, input gradient, weight gradient). On a CPU torchao emulates
float8: same numbers, no speedup. Source of the formats: Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_cpt.distributed.float8_filter import in_float8
from titan_cpt.distributed.options import Float8Options
from titan_cpt.errors import ConfigError, how_to_install

MIN_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
_WRAPPER = "WeightWithDynamicFloat8CastTensor"  # torchao's class of a weight that FSDP2 gathers in float8


def require_float8(device: torch.device) -> None:
    """Check that this machine supports float8 training.

    Raises:
        ConfigError: torchao cannot be imported, or the GPU does not support float8 matrix multiplication.
    """
    try:
        import torchao.float8  # noqa: F401  # find_spec is not enough: a build for another torch fails to import
    except ImportError as error:
        raise ConfigError(
            f"float8.recipe_name: needs torchao ({error}); {how_to_install('torchao')}; or remove the key"
        ) from None
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        raise ConfigError(
            f"float8.recipe_name: needs a GPU of compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or higher; "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: remove the key"
        )


def convert_layers(model: nn.Module, float8: Float8Options, *, tp: int, sharded: bool, emulated: bool) -> None:
    """Replace the linear layers that `in_float8` selects with torchao's float8 layers; the weights do not change.

    Args:
        model: not sharded yet; may be on the meta device.
        float8: recipe, float8 all-gather, and layers to exclude.
        tp: degree of the tensor parallelism that will be applied.
        sharded: whether FSDP2 will be applied; without it `fsdp_all_gather` has no effect.
        emulated: whether to emulate float8 in software, as a CPU needs.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # optional, slow to import

    recipe = Float8LinearConfig.from_recipe_name(float8.recipe)
    config = replace(recipe, emulate=emulated, enable_fsdp_float8_all_gather=float8.fsdp_all_gather and sharded)

    def wanted(layer: nn.Module, name: str) -> bool:
        assert isinstance(layer, nn.Linear), f"expected a linear layer, got {type(layer).__name__}"
        size = tuple(layer.weight.shape)
        return in_float8(name, size, tp=tp, filter_fqns=float8.filter_fqns, recipe=float8.recipe)

    convert_to_float8_training(model, module_filter_fn=wanted, config=config)


def refresh_scales(model: nn.Module) -> None:
    """Compute the scales of all weights that FSDP2 all-gathers in float8; call after every change of the weights.

    One collective for all layers, instead of one per layer before each all-gather. With outdated scales the weights
    would saturate or lose precision silently. Does nothing if FSDP2 does not gather in float8.
    """
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def without_float8_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with torchao's weight wrappers replaced by the float32 tensors inside them, without a copy.

    A checkpoint saved from it can be loaded with or without float8, and with any parallelism.
    """
    return {name: _plain(value) if _cast_before_gather(value) else value for name, value in state.items()}


@torch.no_grad()
def local_values(tensor: Tensor) -> Tensor:
    """This rank's shard as a plain tensor that shares its memory, without torchao's wrapper."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    if type(local).__name__ == _WRAPPER:
        local = local._tensor  # type: ignore[attr-defined]  # torchao's attribute for the wrapped tensor
    return local


def _cast_before_gather(value: Any) -> bool:
    return isinstance(value, DTensor) and type(value.to_local()).__name__ == _WRAPPER


def _plain(weight: DTensor) -> DTensor:
    return DTensor.from_local(
        local_values(weight),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
