"""AdamW as one Triton launch for all parameters, for `optimizer.implementation = "triton"`. CUDA only.

The state of each parameter is that of torch's AdamW (`step`, `exp_avg`, `exp_avg_sq` in float32), so a checkpoint that
one implementation saves resumes under the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from titan_cpt.distributed.float8 import local_values

CHUNK = 8192
"""Elements that one program updates. A program reads four numbers from memory before its first element."""
BLOCK = 512
"""Elements at a time: 4 for each thread, 16 bytes of float32. With 8, half as many warps fit into the registers."""
WARPS = 4
"""Warps of a program."""
_EMPTY = 16  # in place of address 0, for the gradient of a shard without elements: its step is counted too
_TENSORS_PER_PROGRAM = 128  # of the kernel that counts the steps


class TritonAdamW(AdamW):
    """torch's AdamW with a step that reads and writes every number once.

    In the same launch it multiplies the gradients, which may be in bfloat16 or float32, by `clip_factor`, obeys the
    flag `found_inf` (see `UpdateGuard`), and writes the bf16 compute copy. The operations and their order are those of
    torch's fused AdamW; a tensor's scalars (bias corrections, lr x weight decay) are computed in float64 and rounded
    once, the elements in float32. torch's kernels differ among versions and devices in where they compute in float64,
    so that weights and moments differ in the last bits.

    A CUDA graph captures only the launches: with `uploads` set to False, `step` reads hyperparameters and addresses as
    `write_hyperparameters` and `write_addresses` have last put them into device memory.

    Args:
        groups: parameter groups, as `parameter_groups` makes them; DTensors are updated shard by shard.
        copies: master weight -> bf16 tensor of the same shape that receives the updated weight.
    """

    clip_factor: Tensor
    """float32, 0-dimensional, on the device: factor of the gradients in the next step."""
    uploads: bool = True
    """Whether `step` copies hyperparameters and addresses to the device itself."""
    found_inf: Tensor
    """float32, 0-dimensional, on the device: unless 0, a step changes nothing. `UpdateGuard` puts its own flag here."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        from titan_cpt.training.cuda import adamw_kernel  # CPU builds of torch come without Triton

        self._kernels = adamw_kernel
        copies = copies or {}
        self._rows = [(p, index) for index, group in enumerate(self.param_groups) for p in group["params"]]
        self._copies = [copies.get(parameter) for parameter, _ in self._rows]
        sizes = [local_values(parameter).numel() for parameter, _ in self._rows]
        counts = torch.tensor([-(-size // CHUNK) for size in sizes])
        device = self._rows[0][0].device
        tensors = len(self._rows)
        self._sizes = sizes
        self._chunks = int(counts.sum())
        self._first_chunk = (counts.cumsum(0) - counts).to(torch.int32).to(device)
        self._tensor_of_chunk = torch.repeat_interleave(torch.arange(tensors), counts).to(torch.int32).to(device)
        self._table = torch.zeros(tensors, adamw_kernel.FIELDS.value, dtype=torch.int64, device=device)
        self._scalars = torch.zeros(tensors, adamw_kernel.SCALARS.value, dtype=torch.float32, device=device)
        self._hyperparameters = torch.zeros(
            len(self.param_groups), adamw_kernel.HYPERPARAMETERS.value, dtype=torch.float64, device=device
        )
        self._uploaded: dict[str, list[Any]] = {}
        self.clip_factor = torch.ones((), device=device)
        self.found_inf = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient, unless `found_inf` is set; no host sync."""
        assert closure is None, "closures are not supported"
        if self.uploads:
            self.write_hyperparameters()
            self.write_addresses()
        self.launch()

    @torch.no_grad()
    def write_hyperparameters(self) -> None:
        """Copy the groups' hyperparameters to the device if they changed since the last call; no host sync."""
        self._upload("hyperparameters", [_hyperparameters(group) for group in self.param_groups], self._hyperparameters)

    @torch.no_grad()
    def write_addresses(self) -> None:
        """Copy the addresses of weights, gradients and state to the device if they changed; no host sync."""
        rows = zip(self._rows, self._copies, self._sizes, strict=True)
        self._upload("table", [self._addresses(p, group, copy, size) for (p, group), copy, size in rows], self._table)

    def launch(self) -> None:
        """Launch the two kernels on the current stream; they read everything that may change from device memory."""
        tensors = len(self._rows)
        self._kernels.advance_steps[(-(-tensors // _TENSORS_PER_PROGRAM),)](
            self._table,
            self._hyperparameters,
            self._scalars,
            self.found_inf,
            tensors,
            BLOCK=_TENSORS_PER_PROGRAM,
        )
        if self._chunks:
            self._kernels.update_weights[(self._chunks,)](
                self._table,
                self._scalars,
                self._tensor_of_chunk,
                self._first_chunk,
                self.clip_factor,
                self.found_inf,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )

    def _upload(self, name: str, rows: list[Any], out: Tensor) -> None:
        """Copy rows of numbers to a tensor on the device, unless they are those of the last call."""
        if self._uploaded.get(name) != rows:
            host = torch.tensor(rows, dtype=out.dtype, pin_memory=out.is_cuda)
            out.copy_(host, non_blocking=True)  # the allocator keeps pinned memory until the copy is done
            self._uploaded[name] = rows

    def _addresses(self, parameter: Tensor, group: int, copy: Tensor | None, size: int) -> tuple[int, ...]:
        """A parameter's row of the address table, see `adamw_kernel.FIELDS`."""
        state = self.state[parameter]
        weight = local_values(parameter)
        exp_avg = local_values(state["exp_avg"])
        exp_avg_sq = local_values(state["exp_avg_sq"])
        tensors = [weight, exp_avg, exp_avg_sq]
        gradient = 0
        if parameter.grad is not None:
            grad = local_values(parameter.grad)
            assert grad.dtype in (torch.float32, torch.bfloat16), f"gradient in {grad.dtype}"
            gradient = grad.data_ptr() | (grad.dtype == torch.bfloat16) or _EMPTY
            tensors.append(grad)
        if copy is not None:
            assert copy.dtype == torch.bfloat16, f"compute copy in {copy.dtype}"
            tensors.append(copy)
        assert all(tensor.is_contiguous() and tensor.numel() == size for tensor in tensors), "not one dense shard"
        return (
            weight.data_ptr(),
            gradient,
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            0 if copy is None else copy.data_ptr(),
            state["step"].data_ptr(),
            size,
            group,
        )


def _hyperparameters(group: Mapping[str, Any]) -> tuple[float, ...]:
    """A group's row of the hyperparameter table, see `adamw_kernel.HYPERPARAMETERS`."""
    beta1, beta2 = group["betas"]
    logarithms = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    return (float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], *logarithms)
