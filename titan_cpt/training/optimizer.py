"""AdamW and what surrounds its step: parameter groups, clipping, the guard against bad numbers, resetting at a stage.

Nothing here waits for the device: the learning rate is a Python number, norms and flags stay tensors.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW


def build_adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> AdamW:
    """Fused AdamW over the model's parameters, its moments and step counts there from the start, all zero.

    They are there before the first step so that a checkpoint of step 0 can be written: torch's distributed checkpoint
    would otherwise make them up by a step with zero gradients, which leaves the step count at 1. Source: Loshchilov and
    Hutter 2019, arXiv:1711.05101, with torch's reading: p <- p - lr * weight_decay * p, before the update.

    Args:
        model: sharded already, where it is to be sharded.
        lr: learning rate until `set_lr` is called.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: multiplies lr; see `parameter_groups` for what it is applied to.
    """
    optimizer = AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)
    reset_state(optimizer)
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices, the embeddings among them, are decayed; vectors (biases, LayerNorm) are not.

    As in GPT-NeoX. A group without parameters is left out; frozen parameters are in none.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, object]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_lr(optimizer: AdamW, lr: float) -> None:
    """Use this learning rate from the next step on, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_hyperparameters(optimizer: AdamW, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Use the new stage's numbers from the next step on; moments and step counts stay.

    To be called AFTER an optimizer state was loaded: torch saves these numbers with the state, and loading puts the old
    stage's back without a word. The group of vectors stays without decay.
    """
    for group in optimizer.param_groups:
        decayed = any(parameter.ndim > 1 for parameter in group["params"])
        group.update(betas=betas, eps=eps, weight_decay=weight_decay if decayed else 0.0)


@torch.no_grad()
def reset_state(optimizer: AdamW) -> None:
    """Zero moments and step counts, in place where there are any: the next step is Adam's first.

    This is `optimizer_state = "reset"`, the paper's choice, as there is often no state to keep. For "keep" leave the
    state alone, its step counts too (zero moments with a high step count would take the wrong bias correction, and the
    other way about), and call `set_hyperparameters`.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                # A step count on the parameter's device is what the fused kernel wants; it is plain even for a DTensor.
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            for value in state.values():
                value.zero_()


def clip_grad_norm(model: nn.Module, max_norm: float, pipeline: dist.ProcessGroup | None = None) -> Tensor:
    """Scale all gradients down so that their common L2 norm is at most `max_norm`; returns the norm before that.

    The norm spans the whole mesh of sharded parameters and all stages of a pipeline, and is the same on each rank. No
    host sync and no check: a norm that is not finite turns the gradients into NaN or 0, which `UpdateGuard` keeps from
    the weights.

    Args:
        model: all its gradients are plain tensors, or all are DTensors of one mesh.
        max_norm: above 0.
        pipeline: the ranks that hold the model's other layers, where there are any.

    Returns:
        A plain tensor without dimensions, on the gradients' device.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if pipeline is not None:
        squared = norm.square()
        dist.all_reduce(squared, group=pipeline)
        norm = squared.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class UpdateGuard:
    """Keeps a loss or a gradient that is not finite from the weights, without waiting for the device.

    The first bad number sets a flag on the device, on every rank; while it is set, `optimizer.step()` changes nothing:
    no weight, no moment, no step count. The flag is the one by which GradScaler tells torch's fused AdamW to skip a
    step. The host reads `halted` when it waits for the device anyway (at a logging step) and finds the weights as they
    were before the bad step, however many steps ago that was.
    """

    def __init__(self, optimizer: AdamW, *, spike_window: int = 0, spike_z_score: float = math.inf) -> None:
        """Guard this optimizer's steps.

        Args:
            spike_window: losses that the next one is compared with; 0 for none.
            spike_z_score: a loss so many standard deviations above their mean is held back too.
        """
        self._optimizer, self._spike_z_score = optimizer, spike_z_score
        device = optimizer.param_groups[0]["params"][0].device
        self.halted = torch.zeros((), dtype=torch.float32, device=device)
        """1.0 from the first bad step on, 0.0 before, on all ranks alike. `bool(guard.halted)` waits for the device."""
        optimizer.found_inf = self.halted  # type: ignore[attr-defined]  # the name that AdamW.step looks up
        self._losses = torch.full((spike_window,), math.nan, device=device)

    @torch.no_grad()
    def observe(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Take note of this step's numbers; to be called by all ranks before `optimizer.step()`.

        The ranks agree on the flag (a reduction of one number), or those that saw nothing wrong would go on alone: a
        rank's loss can be infinite while all gradients are finite.

        Args:
            loss: this rank's share of the step's loss, or the whole, without dimensions.
            grad_norm: what `clip_grad_norm` returned.

        Returns:
            [`halted` after this step, the loss's z-score over the window before it: NaN until the window is full].
        """
        assert all(group["fused"] for group in self._optimizer.param_groups), "only the fused AdamW heeds the guard"
        deviation, mean = torch.std_mean(self._losses, correction=0) if len(self._losses) else (loss, loss * math.nan)
        z_score = (loss - mean) / deviation.clamp(min=1e-6)
        healthy = torch.isfinite(loss) & torch.isfinite(grad_norm) & ~(z_score > self._spike_z_score)
        self.halted.copy_(torch.maximum(self.halted, 1.0 - healthy.float()))
        if dist.is_initialized():
            dist.all_reduce(self.halted, op=dist.ReduceOp.MAX)
        if len(self._losses):
            moved = torch.cat([self._losses[1:], loss.float().reshape(1)])
            self._losses.copy_(torch.where(self.halted > 0, self._losses, moved))
        return torch.stack([self.halted, z_score.float()])

    def recent_losses(self) -> list[float]:
        """The window's losses, oldest first, as many as there are; waits for the device."""
        return [loss for loss in self._losses.tolist() if not math.isnan(loss)]

    def recall(self, losses: Sequence[float]) -> None:
        """Compare with these losses from now on, oldest first, or with none until there are enough."""
        window = len(self._losses)
        kept = [math.nan] * window + [float(loss) for loss in losses]
        self._losses.copy_(torch.tensor(kept[len(kept) - window :]))

    def reset(self) -> None:
        """Let updates through again, after the host has dealt with the cause."""
        self.halted.zero_()
