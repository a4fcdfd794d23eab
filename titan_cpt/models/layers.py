"""What the model families share: rotary positions, causal attention, and initial weights that no layout can change.

Shape letters: B sequences, L positions, N heads, H head width, R half of a head's rotated features.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class RotaryCausalAttention(nn.Module):
    """Rotates queries and keys by their positions and attends causally; no weights.

    A module of its own so that context parallelism can put another in its place, one that knows where in the sequence
    its rank's share begins. The tables are worked out anew in each call: they cost L x R elements, hold for any
    sequence length, and leave no buffer that could be wrong after a model was built on the meta device.
    """

    def __init__(self, *, rotary_width: int, rope_base: float) -> None:
        super().__init__()
        self.rotary_width = rotary_width
        self.rope_base = rope_base

    def forward(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        """Attention's result for every position, out_BLNH, in the dtype of the queries."""
        positions_L = torch.arange(q_BLNH.shape[1], device=q_BLNH.device)
        cos_LR, sin_LR = rotary_tables(positions_L, rotary_width=self.rotary_width, base=self.rope_base)
        q_BNLH = rotate(q_BLNH.transpose(1, 2), cos_LR, sin_LR)
        k_BNLH = rotate(k_BLNH.transpose(1, 2), cos_LR, sin_LR)
        out_BNLH = F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BLNH.transpose(1, 2), is_causal=True)
        return out_BNLH.transpose(1, 2)


def rotary_tables(positions_L: Tensor, *, rotary_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angle for every pair of features, cos_LR and sin_LR, in fp32.

        angle(p, i) = p * base^(-2 i / rotary_width)        0 <= i < R = rotary_width / 2

    Always fp32: in bf16 the positions above 256 would run together.
    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    exponents_R = torch.arange(0, rotary_width, 2, device=positions_L.device, dtype=torch.float32) / rotary_width
    angles_LR = positions_L.float()[:, None] * (1.0 / base**exponents_R)
    return angles_LR.cos(), angles_LR.sin()


def rotate(x_BNLH: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """Rotate the first 2R features of each head and pass the others on; computed in fp32, returned in x's dtype.

    Feature i is paired with feature i + R (the halves of GPT-NeoX and Llama on the hub), not with its neighbour as in
    the paper: the same up to a permutation of the weights.
    """
    half = cos_LR.shape[-1]
    first, second = x_BNLH[..., :half].float(), x_BNLH[..., half : 2 * half].float()
    rotated = torch.cat((first * cos_LR - second * sin_LR, second * cos_LR + first * sin_LR), dim=-1)
    return torch.cat((rotated.to(x_BNLH.dtype), x_BNLH[..., 2 * half :]), dim=-1)


@torch.no_grad()
def fill_normal(weight: Tensor, *, std: float, seed: int, name: str) -> None:
    """Fill a weight with draws from N(0, std) that depend on the run's seed and the weight's name alone.

    The whole weight is drawn in fp32 on the CPU and a sharded one keeps its share, without communication: so neither
    the device, the number of ranks nor a pipeline's cuts change a model's first weights. (A DTensor's own `normal_`
    repeats one draw on every rank of a CPU mesh.) This costs each rank the draw of every weight that it holds a part
    of.

    Args:
        weight: a tensor or a DTensor of any placement.
        std: standard deviation.
        seed: the run's seed.
        name: the weight's name in the whole model, without the prefixes of wrappers.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # the sign bit is not accepted
    drawn = torch.randn(weight.shape, generator=generator).mul_(std)
    if isinstance(weight, DTensor):
        drawn = distribute_tensor(drawn, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(drawn)


def init_linear(linear: nn.Linear, *, std: float, seed: int, name: str) -> None:
    """A linear layer's first weights: N(0, std), and a bias of 0 where there is one. `name` is the layer's."""
    fill_normal(linear.weight, std=std, seed=seed, name=f"{name}.weight")
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
