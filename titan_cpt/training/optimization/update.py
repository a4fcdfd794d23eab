"""What every step does beside `optimizer.step()`: learning rate, clipping, the guard against bad numbers. No sync."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from titan_cpt.training.cuda.adamw import TritonAdamW
from titan_cpt.training.optimization.adamw import LR_SCALE


def set_lr(optimizer: AdamW, lr: float) -> None:
    """Set the learning rate of every parameter group, times the group's factor where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_SCALE] if LR_SCALE in group else lr


def clip_grad_norm(
    model: nn.Module, max_norm: float, pipeline: dist.ProcessGroup | None = None, *, optimizer: AdamW | None = None
) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most `max_norm`; returns the norm before clipping.

    `TritonAdamW` multiplies them in its step: here it only receives the factor, and the gradients stay as they are.

    The norm spans all sharded parameters and all pipeline stages, and is the same on every rank. No host sync and no
    check: a norm that is not finite turns the gradients into NaN or 0, and `UpdateGuard` then prevents the update.

    Args:
        model: all its gradients are plain tensors, or all are DTensors of one mesh.
        max_norm: largest L2 norm after clipping, above 0.
        pipeline: process group of the pipeline-parallel ranks; None without pipeline parallelism.
        optimizer: whose next step applies these gradients.

    Returns:
        A plain 0-dimensional tensor on the gradients' device.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = _total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if not parameters:  # a pipeline stage of which nothing is trained: torch's zero is on the CPU
        norm = torch.zeros((), device=next(model.parameters()).device)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if pipeline is not None:
        squared = norm.square()
        dist.all_reduce(squared, group=pipeline)
        norm = squared.sqrt()
    if isinstance(optimizer, TritonAdamW):
        optimizer.clip_factor.copy_((max_norm / (norm + 1e-6)).clamp(max=1.0))  # torch's factor
    else:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, in float32; torch's function would round the norms of bf16 gradients."""
    reduced = [gradient for gradient in gradients if gradient.dtype == torch.bfloat16]
    if not reduced:
        return nn.utils.get_total_norm(gradients)
    others = [gradient for gradient in gradients if gradient.dtype != torch.bfloat16]
    norms = [norm for part in (reduced, others) if part for norm in torch._foreach_norm(part, 2, dtype=torch.float32)]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


class UpdateGuard:
    """Prevents optimizer updates from the first bad step on, without a host sync.

    The first bad loss or gradient sets a flag on the device, on every rank; while it is set, `optimizer.step()` changes
    no weight, no moment and no step count. The flag is the one with which GradScaler makes torch's fused AdamW skip a
    step. The host reads `halted` when it waits for the device anyway (at a logging step) and finds the weights as they
    were before the bad step, however many steps ago that was.
    """

    def __init__(self, optimizer: AdamW, *, spike_window: int = 0, spike_z_score: float = math.inf) -> None:
        """Guard this optimizer's steps.

        Args:
            spike_window: number of recent losses that the next loss is compared with; 0 for no comparison.
            spike_z_score: a loss more than this many standard deviations above their mean is a bad step too.
        """
        self._optimizer = optimizer
        self._spike_z_score = spike_z_score
        device = optimizer.param_groups[0]["params"][0].device
        self.halted = torch.zeros((), dtype=torch.float32, device=device)
        """1.0 from the first bad step on, 0.0 before, on every rank. `bool(guard.halted)` waits for the device."""
        optimizer.found_inf = self.halted  # type: ignore[attr-defined]  # the name that AdamW.step looks up
        self._losses = torch.full((spike_window,), math.nan, device=device)

    @torch.no_grad()
    def observe(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Check this step's loss and gradient norm; all ranks call it before `optimizer.step()`.

        The ranks agree on the flag by an all-reduce of one number: a rank's loss can be infinite while all gradients
        are finite, and the other ranks would update their weights.

        Args:
            loss: this rank's share of the step's loss, or the whole loss; 0-dimensional.
            grad_norm: the result of `clip_grad_norm`.

        Returns:
            [2]: `halted` after this step, and the loss's z-score over the window before it, NaN until that is full.
        """
        assert all(group["fused"] for group in self._optimizer.param_groups), "only the fused AdamW reads the flag"
        if len(self._losses):
            deviation, mean = torch.std_mean(self._losses, correction=0)
        else:
            deviation = loss
            mean = loss * math.nan
        z_score = (loss - mean) / deviation.clamp(min=1e-6)
        healthy = torch.isfinite(loss) & torch.isfinite(grad_norm) & ~(z_score > self._spike_z_score)
        self.halted.copy_(torch.maximum(self.halted, 1.0 - healthy.float()))
        if dist.is_initialized():
            dist.all_reduce(self.halted, op=dist.ReduceOp.MAX)
        if len(self._losses):
            shifted = torch.cat([self._losses[1:], loss.float().reshape(1)])
            self._losses.copy_(torch.where(self.halted > 0, self._losses, shifted))
        return torch.stack([self.halted, z_score.float()])

    def recent_losses(self) -> list[float]:
        """The losses in the window, oldest first; waits for the device."""
        return [loss for loss in self._losses.tolist() if not math.isnan(loss)]

    def restore_losses(self, losses: Sequence[float]) -> None:
        """Replace the window's losses, oldest first; the guard detects spikes once the window is full."""
        window = len(self._losses)
        padded = [math.nan] * window + [float(loss) for loss in losses]
        self._losses.copy_(torch.tensor(padded[len(padded) - window :]))

    def reset(self) -> None:
        """Allow updates again, after the host has handled the bad step."""
        self.halted.zero_()
