"""Matrix products in 8 bits, by torchao: which layers, how they are scaled, and how FSDP2 gathers their weights.

Weights and moments stay float32; a converted layer casts its input, its weight and the gradient of its output to float8
right before each of its three products. Where there is no hardware for that (a CPU), torchao emulates it: the numbers
of float8, without its speed. Source: Micikevicius et al. 2022, arXiv:2209.05433, for the formats.
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

LEAST_CAPABILITY = (8, 9)  # Ada, Hopper and later multiply in float8


def require_float8(device: torch.device) -> None:
    """That this machine can do what is asked.

    Raises:
        ConfigError: torchao is not installed, or the GPU does not multiply in float8.
    """
    try:
        import torchao.float8  # noqa: F401  # not only looked for: one built for another torch does not import
    except ImportError as error:
        raise ConfigError(
            f"float8.recipe_name: needs torchao ({error}); {how_to_install('torchao')}; or leave the key out"
        ) from None
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        raise ConfigError(
            f"float8.recipe_name: {torch.cuda.get_device_name(device)} (compute capability {found[0]}.{found[1]}) has "
            f"no products in float8; it takes {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or more: leave it out"
        )


def convert_layers(model: nn.Module, float8: Float8Options, *, tp: int, sharded: bool, emulated: bool) -> None:
    """Put torchao's float8 layers in the place of the linear layers that `in_float8` names; the weights stay.

    Args:
        model: not split or sharded yet; on the meta device or off it.
        tp: ranks over which matrices will be split.
        sharded: FSDP2 will gather the weights, so that casting them before means something.
        emulated: there is no hardware for these products.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # an optional package, and a slow one

    recipe = Float8LinearConfig.from_recipe_name(float8.recipe)
    config = replace(recipe, emulate=emulated, enable_fsdp_float8_all_gather=float8.fsdp_all_gather and sharded)

    def wanted(layer: nn.Module, name: str) -> bool:
        assert isinstance(layer, nn.Linear), f"torchao asks about linear layers only, not {type(layer).__name__}"
        return in_float8(name, tuple(layer.weight.shape), tp=tp, filter_fqns=float8.filter_fqns)

    convert_to_float8_training(model, module_filter_fn=wanted, config=config)


def refresh_scales(model: nn.Module) -> None:
    """Work out the scales of all weights that are gathered in float8, at once; to be called whenever weights changed.

    Without it each layer would ask the other ranks for its own scale before every gather. The scale of older weights
    would saturate newer ones, or waste their range, without a word. Does nothing where no weight is gathered so.
    """
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def without_float8_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with plain float32 tensors in the place of those that FSDP2 casts, sharing their memory.

    So that a checkpoint holds nothing of torchao's and is read under any layout, with float8 or without.
    """
    return {name: _plain(value) if _cast_before_gather(value) else value for name, value in state.items()}


def _cast_before_gather(value: Any) -> bool:
    return isinstance(value, DTensor) and type(value.to_local()).__name__ == "WeightWithDynamicFloat8CastTensor"


def _plain(weight: DTensor) -> DTensor:
    local: Tensor = weight.to_local()._tensor  # type: ignore[attr-defined]  # torchao's name for what it wraps
    return DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
