"""Weight initialization that depends only on the seed and on each weight's name, not on devices or parallelism."""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def fill_normal(weight: Tensor, *, std: float, seed: int, name: str, cutoff: float | None = None) -> None:
    """Fill a weight with samples of N(0, std^2) that depend only on the run's seed and the weight's name.

    Each rank draws the whole weight in fp32 on the CPU and keeps its shard, without communication, so that initial
    weights are the same for every device, world size and pipeline split. (`DTensor.normal_` cannot be used: on a CPU
    mesh it draws the same numbers for every shard.)

    Args:
        weight: a tensor, or a DTensor with any placements; overwritten.
        std: standard deviation.
        seed: the run's seed.
        name: the weight's name in the whole model, without the prefixes of wrappers.
        cutoff: draw from the part of the distribution within cutoff * std (a truncated normal distribution).
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(
        int.from_bytes(digest, "big") >> 1
    )  # torch's seeds are signed: clear the sign bit
    if cutoff is None:
        drawn = torch.randn(weight.shape, generator=generator).mul_(std)
    else:  # the inverse of the distribution function, of uniform numbers
        inside = math.erf(cutoff / math.sqrt(2))
        uniform = torch.rand(weight.shape, generator=generator).mul_(2 * inside).sub_(inside)
        drawn = uniform.erfinv_().mul_(math.sqrt(2) * std)
    if isinstance(weight, DTensor):
        drawn = distribute_tensor(drawn, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(drawn)


def init_linear(linear: nn.Linear, *, std: float, seed: int, name: str, cutoff: float | None = None) -> None:
    """Initialize a linear layer: weight as in `fill_normal`, bias 0. `name` is the layer's name in the whole model."""
    fill_normal(linear.weight, std=std, seed=seed, name=f"{name}.weight", cutoff=cutoff)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
