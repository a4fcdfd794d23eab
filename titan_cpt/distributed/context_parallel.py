"""Context parallelism: the positions of a sequence are split over ranks, and attention gathers the others' keys.

A sequence is cut into 2 x cp equal pieces; rank r holds pieces r and 2 cp - 1 - r, an early and a late one, so that
under a causal mask every rank has the same number of keys to look at. Queries stay where they are; keys and values are
gathered, which works on every device and, with grouped or wide heads, costs less than attention itself; under a sliding
window the gathered ones are cut to what a piece can see. Source of the balance and of gathering: Llama 3,
arXiv:2407.21783, section 3.3.2.

Shape letters: B sequences, L positions of the whole sequence, P positions of this rank, S positions that a piece of it
may see, N heads, H head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental._context_parallel import (
    _ContextParallel,
    _enable_context_parallel_dispatcher,
)
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel

from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import RotaryCausalAttention, rotary_tables, rotate
from titan_cpt.models.common.ops import attention


def apply_cp(model: LanguageModel, group: dist.ProcessGroup, *, ring: bool) -> None:
    """Replace the attention of each block: all-gather keys and values, or pass them around a ring.

    Args:
        model: whose blocks are replaced in place.
        group: the ranks that share each sequence.
        ring: use torch's ring attention (CUDA only).
    """
    mesh = DeviceMesh.from_group(group, "cuda") if ring else None
    for block_attention in model.attentions():
        core = cast(RotaryCausalAttention, block_attention.core)
        block_attention.core = ContextParallelAttention(core, group) if mesh is None else RingAttention(core, mesh)


def own_positions(length: int, rank: int, degree: int) -> Tensor:
    """The positions of a sequence of `length` that a context rank holds, ascending, int64 [P]."""
    pieces = torch.arange(length).chunk(2 * degree)
    return torch.cat((pieces[rank], pieces[2 * degree - 1 - rank]))


class ContextParallelAttention(nn.Module):
    """Takes the place of `RotaryCausalAttention` on a rank that holds two pieces of every sequence; no weights."""

    def __init__(self, plain: RotaryCausalAttention, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.rotary_width, self.rope_base, self.group = plain.rotary_width, plain.rope_base, group
        self.scaling, self.window = plain.scaling, plain.window

    def forward(self, q_BPNH: Tensor, k_BPNH: Tensor, v_BPNH: Tensor) -> Tensor:
        """Attention's result for this rank's positions, out_BPNH; keys and values may have fewer heads than queries."""
        degree, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        own, device = q_BPNH.shape[1], q_BPNH.device
        positions_P = own_positions(own * degree, rank, degree).to(device)
        cos_PR, sin_PR = rotary_tables(
            positions_P, rotary_width=self.rotary_width, base=self.rope_base, scaling=self.scaling
        )
        q_BNPH = rotate(q_BPNH.transpose(1, 2), cos_PR, sin_PR)
        k_BNPH = rotate(k_BPNH.transpose(1, 2), cos_PR, sin_PR)
        k_BNLH = _in_sequence_order(k_BNPH, self.group)
        v_BNLH = _in_sequence_order(v_BPNH.transpose(1, 2), self.group)
        shared_by = q_BNPH.shape[1] // k_BNLH.shape[1]
        # After they were sent: the kernels that take a mask want as many heads of keys as of queries.
        k_BNLH, v_BNLH = (x.repeat_interleave(shared_by, dim=1) if shared_by > 1 else x for x in (k_BNLH, v_BNLH))

        piece, out = own // 2, []
        window = own * degree if self.window is None else self.window
        for half, first in zip(q_BNPH.chunk(2, dim=2), (rank * piece, (2 * degree - 1 - rank) * piece), strict=True):
            since, until = max(0, first - window + 1), first + piece  # nothing of this piece looks farther
            mask = torch.ones(piece, until - since, dtype=torch.bool, device=device)
            mask = mask.tril(first - since).triu(first - since - window + 1)  # position p sees p - window + 1 to p
            k_BNSH, v_BNSH = k_BNLH[:, :, since:until], v_BNLH[:, :, since:until]
            out.append(attention(half, k_BNSH, v_BNSH, attn_mask=mask))
        return torch.cat(out, dim=2).transpose(1, 2)


class RingAttention(nn.Module):
    """As `ContextParallelAttention`, by torch's ring: keys and values come by piece by piece, none is held whole.

    On CUDA, whose attention kernels return what partial results are merged by. Torch takes the rank's positions to be
    an early and a late piece, as `own_positions` cuts them (a test holds the two together). Never run by us: no GPU was
    at hand. Source: Liu et al. 2023, arXiv:2310.01889.
    """

    def __init__(self, plain: RotaryCausalAttention, mesh: DeviceMesh) -> None:
        super().__init__()
        assert plain.window is None, "torch's ring knows no sliding window; the rules refuse it"
        self.rotary_width, self.rope_base, self.scaling = plain.rotary_width, plain.rope_base, plain.scaling
        self.group = mesh.get_group()
        _enable_context_parallel_dispatcher()
        style = _ContextParallel(seq_dim=2, attention_type=_ContextParallel.AttentionType.SDPA)
        self.attend = parallelize_module(_CausalProduct(), mesh, style)

    def forward(self, q_BPNH: Tensor, k_BPNH: Tensor, v_BPNH: Tensor) -> Tensor:
        """Attention's result for this rank's positions, out_BPNH; keys and values may have fewer heads than queries."""
        degree, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        positions_P = own_positions(q_BPNH.shape[1] * degree, rank, degree).to(q_BPNH.device)
        cos_PR, sin_PR = rotary_tables(
            positions_P, rotary_width=self.rotary_width, base=self.rope_base, scaling=self.scaling
        )
        q_BNPH = rotate(q_BPNH.transpose(1, 2), cos_PR, sin_PR)
        k_BNPH = rotate(k_BPNH.transpose(1, 2), cos_PR, sin_PR)
        shared_by = q_BPNH.shape[2] // k_BPNH.shape[2]
        k_BNPH, v_BNPH = (
            x.repeat_interleave(shared_by, dim=1) if shared_by > 1 else x for x in (k_BNPH, v_BPNH.transpose(1, 2))
        )
        out_BNPH: Tensor = self.attend(q_BNPH, k_BNPH, v_BNPH)
        return out_BNPH.transpose(1, 2)


class _CausalProduct(nn.Module):
    """Attention proper, in a module of its own, for torch to lay its ring around."""

    def forward(self, q_BNPH: Tensor, k_BNPH: Tensor, v_BNPH: Tensor) -> Tensor:
        """As if these were all the positions there are."""
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            return F.scaled_dot_product_attention(q_BNPH, k_BNPH, v_BNPH, is_causal=True)


def _in_sequence_order(x_BNPH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' pieces, in the order of the sequence, x_BNLH."""
    degree = dist.get_world_size(group)
    gathered: Tensor = _GatherPositions.apply(x_BNPH, group)  # type: ignore[no-untyped-call]
    pieces = gathered.chunk(2 * degree, dim=2)  # rank 0's early and late piece, then rank 1's ...
    return torch.cat((*pieces[0::2], *pieces[1::2][::-1]), dim=2)


class _GatherPositions(torch.autograd.Function):
    """Concatenates the ranks' positions, rank after rank; the gradient is summed over ranks in fp32 and cut again."""

    @staticmethod
    def forward(ctx: Any, x_BNPH: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x_BNPH, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, x_BNPH.contiguous(), group=group)
        return torch.cat(parts, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNLH: Tensor) -> tuple[Tensor, None]:
        parts = [part.float().contiguous() for part in grad_BNLH.chunk(ctx.group.size(), dim=2)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own.to(grad_BNLH.dtype), None
