"""What the model families share: rotary positions, causal attention, and initial weights that no layout can change.

Shape letters: B sequences, L positions, N heads, H head width, R half of a head's rotated features.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_cpt.models.common.ops import attention, cos_sin, linear
from titan_cpt.models.spec import RopeScaling


class RotaryCausalAttention(nn.Module):
    """Rotates queries and keys by their positions and attends causally; no weights.

    A module of its own so that context parallelism can put another in its place, one that knows where in the sequence
    its rank's share begins. The tables are worked out anew in each call: they cost L x R elements, hold for any
    sequence length, and leave no buffer that could be wrong after a model was built on the meta device.

    Args:
        rotary_width: features of each head that are rotated.
        rope_base: base of the wavelengths.
        scaling: how the wavelengths are stretched, if they are.
        window: positions that each one sees, itself included; None for all before it.
    """

    def __init__(
        self, *, rotary_width: int, rope_base: float, scaling: RopeScaling | None = None, window: int | None = None
    ) -> None:
        super().__init__()
        self.rotary_width, self.rope_base = rotary_width, rope_base
        self.scaling, self.window = scaling, window

    def forward(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        """Attention's result for every position, out_BLNH, in the dtype of the queries.

        There may be fewer heads of keys and values than of queries; each then serves as many neighbouring ones.
        """
        positions_L = torch.arange(q_BLNH.shape[1], device=q_BLNH.device)
        cos_LR, sin_LR = rotary_tables(
            positions_L, rotary_width=self.rotary_width, base=self.rope_base, scaling=self.scaling
        )
        q_BNLH = rotate(q_BLNH.transpose(1, 2), cos_LR, sin_LR)
        k_BNLH = rotate(k_BLNH.transpose(1, 2), cos_LR, sin_LR)
        return self.attend(q_BNLH, k_BNLH, v_BLNH.transpose(1, 2)).transpose(1, 2)

    def attend(self, q_BNLH: Tensor, k_BNLH: Tensor, v_BNLH: Tensor) -> Tensor:
        """Attention proper, out_BNLH, of queries and keys that are rotated already."""
        group, length = q_BNLH.shape[1] // k_BNLH.shape[1], q_BNLH.shape[2]
        if self.window is None or length <= self.window:
            return attention(q_BNLH, k_BNLH, v_BNLH, is_causal=True, enable_gqa=group > 1)
        behind_LL = torch.arange(length, device=q_BNLH.device)
        behind_LL = behind_LL[:, None] - behind_LL[None, :]
        seen_LL = (behind_LL >= 0) & (behind_LL < self.window)
        # The kernels that take a mask and do not keep L x L scores want as many heads of keys as of queries.
        k_BNLH, v_BNLH = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k_BNLH, v_BNLH))
        return attention(q_BNLH, k_BNLH, v_BNLH, attn_mask=seen_LL)


class Head(nn.Linear):
    """The projection to the vocabulary, or what is asked for in its place, such as a loss that holds no whole logits.

    What is asked for gets the residual stream and the weight here, inside the module's own call, as FSDP2 gathers the
    weight for no longer than that.
    """

    def forward(self, x_BLD: Tensor, project: "Project" = linear) -> Tensor:
        """`project(x_BLD, weight_VD)`, by default the logits."""
        return project(x_BLD, self.weight)


Project = Callable[[Tensor, Tensor], Tensor]
"""Of the residual stream x_BLD and the head's weight_VD: logits_BLV, or a loss worked out from them."""


def rotary_tables(
    positions_L: Tensor, *, rotary_width: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angle for every pair of features, cos_LR and sin_LR, in fp32.

        angle(p, i) = p * base^(-2 i / rotary_width)        0 <= i < R = rotary_width / 2

    Always fp32: in bf16 the positions above 256 would run together. A scaling changes the frequencies, and YaRN
    multiplies both tables besides, which sharpens attention.
    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    exponents_R = torch.arange(0, rotary_width, 2, device=positions_L.device, dtype=torch.float32) / rotary_width
    frequencies_R = 1.0 / base**exponents_R
    if scaling is None:
        angles_LR = positions_L.float()[:, None] * frequencies_R
        return cos_sin(angles_LR)
    assert scaling.attention_factor is not None, "a checked scaling has one"
    stretch = {"llama3": _llama3_frequencies, "yarn": _yarn_frequencies}[scaling.kind]
    angles_LR = positions_L.float()[:, None] * stretch(frequencies_R, base, scaling)
    cos_LR, sin_LR = cos_sin(angles_LR)
    return cos_LR * scaling.attention_factor, sin_LR * scaling.attention_factor


def _llama3_frequencies(frequencies_R: Tensor, _base: float, scaling: RopeScaling) -> Tensor:
    """Frequencies f of Llama 3.1: short wavelengths kept, long ones stretched, a straight line in f between them.

        f * (s + (1 - s) / factor)        s = clamp((original f / 2 pi - low) / (high - low), 0, 1)

    Source: Grattafiori et al. 2024, arXiv:2407.21783, section 3.4.2, with the form of the reference code.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_R = scaling.original_seq_len * frequencies_R / (2 * math.pi)
    kept_R = ((turns_R - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies_R * (kept_R + (1.0 - kept_R) / scaling.factor)


def _yarn_frequencies(frequencies_R: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """Frequencies f of YaRN: fast features kept, slow ones stretched, a straight line in the feature's index between.

        f_i * (k_i + (1 - k_i) / factor)        k_i = 1 - clamp((i - first) / (last - first), 0, 1)

    `first` and `last` are the features that turn beta_fast and beta_slow times over the original length, rounded
    outwards to whole features.
    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2.
    """
    half = frequencies_R.shape[0]

    def feature(turns: float) -> float:
        return half * math.log(scaling.original_seq_len / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(feature(scaling.beta_fast)), 0)
    last = min(math.ceil(feature(scaling.beta_slow)), 2 * half - 1)
    features_R = torch.arange(half, device=frequencies_R.device, dtype=torch.float32)
    kept_R = 1.0 - ((features_R - first) / (last - first or 0.001)).clamp(0.0, 1.0)
    return frequencies_R * (kept_R + (1.0 - kept_R) / scaling.factor)


def rotate(x_BNLH: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """Rotate the first 2R features of each head and pass the others on; computed in fp32, returned in x's dtype.

    Feature i is paired with feature i + R (the halves of GPT-NeoX and Llama on the hub), not with its neighbour as in
    the paper: the same up to a permutation of the weights.
    """
    half = cos_LR.shape[-1]
    first, second = x_BNLH[..., :half].float(), x_BNLH[..., half : 2 * half].float()
    rotated = first * cos_LR - second * sin_LR, second * cos_LR + first * sin_LR
    return torch.cat((*(part.to(x_BNLH.dtype) for part in rotated), x_BNLH[..., 2 * half :]), dim=-1)


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
