"""Context parallelism: a sequence's positions are sharded over ranks; attention all-gathers keys and values.

A sequence is split into 2 x cp equal chunks. Rank r holds chunks r and 2 cp - 1 - r, one early and one late, so that
causal attention takes the same amount of work on each rank. Queries stay local; keys and values are all-gathered,
which works on every device and takes little time compared with attention. With a sliding window each chunk attends only
to the keys inside its window.
Source of the load balancing and of all-gathering: Llama 3, arXiv:2407.21783, section 3.3.2.

Shape letters: B sequences, L positions of the whole sequence, P positions of this rank, S positions that a chunk
attends to, N heads, H head width, R half of a head's rotated features.
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

from titan_cpt.models.common.document_attention import Documents, document_attention
from titan_cpt.models.common.language_model import LanguageModel
from titan_cpt.models.common.layers import RotaryCausalAttention
from titan_cpt.models.common.ops import attention


def apply_cp(model: LanguageModel, group: dist.ProcessGroup, *, ring: bool) -> None:
    """Replace each block's attention with one that all-gathers keys and values, or passes them around a ring.

    Args:
        model: its blocks' `attention.core` is replaced in place.
        group: the ranks that share each sequence.
        ring: use torch's ring attention (CUDA only, without a sliding window).
    """
    mesh = DeviceMesh.from_group(group, "cuda") if ring else None
    for block_attention in model.attentions():
        core = cast(RotaryCausalAttention, block_attention.core)
        block_attention.core = ContextParallelAttention(core, group) if mesh is None else RingAttention(core, mesh)


def local_positions(length: int, rank: int, degree: int) -> Tensor:
    """Positions, of 0 to length - 1, that a context-parallel rank holds: ascending, int64, shape [P]."""
    chunks = torch.arange(length).chunk(2 * degree)
    return torch.cat((chunks[rank], chunks[2 * degree - 1 - rank]))


class ContextParallelAttention(nn.Module):
    """Replaces `RotaryCausalAttention` under context parallelism: all-gathers keys and values. Has no weights."""

    def __init__(self, plain: RotaryCausalAttention, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.rotated, self.set_rope = plain.rotated, plain.set_rope
        self.window = plain.window

    def forward(self, q_BPNH: Tensor, k_BPNH: Tensor, v_BPNH: Tensor, documents: Documents | None = None) -> Tensor:
        """Attention's output for this rank's positions, out_BPNH; k and v may have fewer heads (GQA)."""
        degree, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        own = q_BPNH.shape[1]
        device = q_BPNH.device
        positions_P = local_positions(own * degree, rank, degree).to(device)
        q_BNPH, k_BNPH = self.rotated(q_BPNH.transpose(1, 2), k_BPNH.transpose(1, 2), positions_P, documents)
        k_BNLH = _in_sequence_order(k_BNPH, self.group)
        v_BNLH = _in_sequence_order(v_BPNH.transpose(1, 2), self.group)
        firsts = (rank * own // 2, (2 * degree - 1 - rank) * own // 2)
        if documents is not None and documents.starts_BP is not None:
            parts = [
                document_attention(
                    half, k_BNLH, v_BNLH, documents=documents, window=self.window, first=first, offset=offset
                )
                for half, first, offset in zip(q_BNPH.chunk(2, dim=2), firsts, (0, own // 2), strict=True)
            ]
            return torch.cat(parts, dim=2).transpose(1, 2)
        group = q_BNPH.shape[1] // k_BNLH.shape[1]
        # After the all-gather: fused kernels with a mask need as many key heads as query heads.
        k_BNLH, v_BNLH = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k_BNLH, v_BNLH))

        out: list[Tensor] = []
        chunk = own // 2
        window = own * degree if self.window is None else self.window
        for half, first in zip(q_BNPH.chunk(2, dim=2), firsts, strict=True):
            start, end = max(0, first - window + 1), first + chunk  # the keys that this chunk attends to
            mask = torch.ones(chunk, end - start, dtype=torch.bool, device=device)
            mask = mask.tril(first - start).triu(first - start - window + 1)  # p attends to p - window + 1 ... p
            k_BNSH, v_BNSH = k_BNLH[:, :, start:end], v_BNLH[:, :, start:end]
            out.append(attention(half, k_BNSH, v_BNSH, attn_mask=mask))
        return torch.cat(out, dim=2).transpose(1, 2)


class RingAttention(nn.Module):
    """Replaces `RotaryCausalAttention` with torch's ring attention: no rank holds all keys and values at once.

    CUDA only: partial results are merged with the log-sum-exp that CUDA's attention kernels return. torch expects one
    early and one late chunk per rank, as in `local_positions`; a test compares the two. Not tested on GPUs yet.
    Source: Liu et al. 2023, arXiv:2310.01889.
    """

    def __init__(self, plain: RotaryCausalAttention, mesh: DeviceMesh) -> None:
        super().__init__()
        assert plain.window is None, "torch's ring attention has no sliding window; the plan refuses this"
        self.group = mesh.get_group()
        self.rotated, self.set_rope = plain.rotated, plain.set_rope
        _enable_context_parallel_dispatcher()
        style = _ContextParallel(seq_dim=2, attention_type=_ContextParallel.AttentionType.SDPA)
        self.attend = parallelize_module(_CausalAttention(), mesh, style)

    def forward(self, q_BPNH: Tensor, k_BPNH: Tensor, v_BPNH: Tensor, documents: Documents | None = None) -> Tensor:
        """Attention's output for this rank's positions, out_BPNH; k and v may have fewer heads (GQA)."""
        assert documents is None or documents.starts_BP is None, "the plan refuses a document mask with ring attention"
        degree, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        positions_P = local_positions(q_BPNH.shape[1] * degree, rank, degree).to(q_BPNH.device)
        q_BNPH, k_BNPH = self.rotated(q_BPNH.transpose(1, 2), k_BPNH.transpose(1, 2), positions_P, documents)
        group = q_BPNH.shape[2] // k_BPNH.shape[2]
        v_BNPH = v_BPNH.transpose(1, 2)
        k_BNPH, v_BNPH = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k_BNPH, v_BNPH))
        out_BNPH: Tensor = self.attend(q_BNPH, k_BNPH, v_BNPH)
        return out_BNPH.transpose(1, 2)


class _CausalAttention(nn.Module):
    """Scaled dot-product attention, as a module that torch's context parallelism can wrap."""

    def forward(self, q_BNPH: Tensor, k_BNPH: Tensor, v_BNPH: Tensor) -> Tensor:
        """Causal attention over these positions; torch adds the other ranks' keys and values."""
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            return F.scaled_dot_product_attention(q_BNPH, k_BNPH, v_BNPH, is_causal=True)


def _in_sequence_order(x_BNPH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather the positions of all ranks and restore sequence order; x_BNLH."""
    degree = dist.get_world_size(group)
    gathered: Tensor = _GatherPositions.apply(x_BNPH, group)  # type: ignore[no-untyped-call]
    chunks = gathered.chunk(2 * degree, dim=2)  # rank 0's early and late chunk, then rank 1's ...
    return torch.cat((*chunks[0::2], *chunks[1::2][::-1]), dim=2)


class _GatherPositions(torch.autograd.Function):
    """All-gather positions in rank order; the backward pass reduce-scatters the gradient in fp32."""

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
