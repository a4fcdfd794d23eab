"""AdamW: its parameter groups, its state before the first step, new hyperparameters, resetting. No host sync."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from titan_cpt.planning.plan import MUON_KEYS
from titan_cpt.training.cuda.adamw import TritonAdamW

MOMENTUM_BUFFER = "momentum_buffer"
"""torch.optim.Muon's name of its only state."""
LR_SCALE = "lr_scale"
"""Key of a parameter group: factor of the stage's learning rate; groups without it have the learning rate itself."""


def build_adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    triton: bool = False,
    copies: Mapping[Tensor, Tensor] | None = None,
    allocate: bool = True,
) -> AdamW:
    """Fused AdamW over the model's parameters, with moments and step counts allocated and zero.

    They are allocated before the first step so that a checkpoint of step 0 can be written: torch's distributed
    checkpoint would otherwise create them by a step with zero gradients, which leaves the step count at 1.

        p <- p - lr * weight_decay * p       before Adam's update

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, as torch implements it.

    Args:
        model: under FSDP, already sharded.
        lr: learning rate until the first `set_lr`.
        betas: decay rates of the first and second moment.
        eps: added to the square root of the second moment.
        weight_decay: coefficient of the decoupled decay, for the matrices only (see `parameter_groups`).
        triton: update with our Triton kernel instead of torch's; needs CUDA and Triton.
        copies: with `triton`: master weight -> bf16 compute copy that the update writes too.
        allocate: False: stages train some of the weights; `TrainedWeights.use` allocates the moments of these only.
    """
    groups = parameter_groups(model, weight_decay)
    optimizer: AdamW
    if triton:
        optimizer = TritonAdamW(groups, lr=lr, betas=betas, eps=eps, copies=copies)
    else:
        assert not copies, "only the Triton kernel writes compute copies"
        optimizer = AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if allocate:
        reset_state(optimizer)
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices, including embeddings, with weight decay; vectors (biases, norms) without.

    As in GPT-NeoX. Empty groups are omitted; frozen parameters are in no group.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, object]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_hyperparameters(optimizer: AdamW, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Set a stage's AdamW hyperparameters; moments and step counts do not change.

    Call it AFTER loading an optimizer state: torch saves these hyperparameters with the state, and loading silently
    restores those of the stage that saved it. The group of vectors keeps weight decay 0.
    """
    for group in optimizer.param_groups:
        decayed = any(parameter.ndim > 1 for parameter in group["params"])
        group.update(betas=betas, eps=eps, weight_decay=weight_decay if decayed else 0.0)


@torch.no_grad()
def reset_state(optimizer: AdamW) -> None:
    """Set moments and step counts to zero, in place where they exist: the next step is the optimizer's first.

    This is `optimizer_state = "reset"`, as in the paper (Ibrahim et al. 2024, arXiv:2403.08763). "keep" keeps moments
    and step counts: zero moments with a high step count, or the reverse, would get the wrong bias correction.
    """
    allocate_state(optimizer)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def uses_muon(group: Mapping[str, Any]) -> bool:
    """Whether `Muon` updates the parameters of this group; otherwise AdamW does."""
    return MUON_KEYS[0] in group


@torch.no_grad()
def allocate_state(optimizer: AdamW) -> None:
    """Allocate moments and step counts, or momentum buffers, of parameters that have none, as zeros."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state:
                continue
            if uses_muon(group):
                state[MOMENTUM_BUFFER] = torch.zeros_like(parameter)
                continue
            # The fused kernel needs the step count on the parameter's device, as a plain tensor even for a DTensor.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
