"""Attention inside documents by two kernels for GPUs that skip the pairs of documents: varlen and FlexAttention.

| | varlen: the flash kernel for sequences of several lengths | flex: FlexAttention, a kernel that Triton compiles |
|---|---|---|
| dtypes | bfloat16, float16 | all |
| head widths | multiples of 8, at most 256 | from 16 |
| shapes | follow the number of documents and the longest one | follow B and L only: CUDA graphs can replay it |
| needs | CUDA, Ampere or newer | Triton; no dispatch mode around it |

Neither waits for the device: what varlen needs on the host is computed from the batch before it is copied there. The
flash kernel reserves memory for 128 more positions per document in its backward pass.

Importing this module imports torch's compiler, which takes a second: do it where a run needs these kernels.

Shape letters: B sequences, L positions, N query heads, K key/value heads, H head width, T = B L packed positions, W
blocks of 128 positions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel, varlen

from titan_cpt.models.common.document_attention import DocumentBounds, KernelMask

BLOCK = 128
"""Positions in a block of FlexAttention's mask; torch's default, which its kernels are tuned for."""
_GROUPED = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters  # not in torch 2.11


def kernel_mask(kernel: str, window: int | None, starts_BL: Tensor, bounds: DocumentBounds | None) -> KernelMask:
    """The mask of a batch for "flash", which is varlen, or "flex".

    Args:
        window: sliding-window size in tokens.
        bounds: of the documents, for flash. None: there may be as many as positions, for which it reserves memory.
    """
    if kernel == "flex":
        return flex_mask(starts_BL, window=window)
    count, longest = (bounds.count, bounds.longest) if bounds is not None else (starts_BL.numel(), starts_BL.shape[1])
    return varlen_mask(starts_BL, count=count, longest=max(2, longest), window=window)


@dataclass(frozen=True)
class VarlenMask:
    """The documents of a batch for the flash kernel.

    Attributes:
        ends: cumulative lengths of the documents of all sequences, int32 [count + 1], from 0 to T. After the last
            document the entries are T: empty documents.
        longest: upper bound of their lengths, at least 2: for 1 torch regroups the heads, which empty documents break.
        window: sliding-window size in tokens; None for causal attention.
    """

    ends: Tensor
    longest: int
    window: int | None

    def attend(self, q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor) -> Tensor:
        """Causal attention inside documents, out_BNLH."""
        sequences, heads = q_BNLH.shape[:2]
        grouped = k_BKLH.shape[1] < heads
        if grouped and not _GROUPED:
            k_BKLH, v_BKLH = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_BKLH, v_BKLH))
        q_TNH, k_TKH, v_TKH = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNLH, k_BKLH, v_BKLH))
        options: dict[str, Any] = {"enable_gqa": grouped} if _GROUPED else {}
        # The left side counts the positions before the query's own. (-1, 0): torch calls the causal kernel.
        window = (-1, 0) if self.window is None else (self.window - 1, 0)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # torch 2.15 would prefer cuDNN
            out_TNH = varlen.varlen_attn(
                q_TNH, k_TKH, v_TKH, self.ends, self.ends, self.longest, self.longest, window_size=window, **options
            )
        assert isinstance(out_TNH, Tensor), "no auxiliary output was requested"
        return out_TNH.view(sequences, -1, *out_TNH.shape[1:]).transpose(1, 2)


def varlen_mask(starts_BL: Tensor, *, count: int, longest: int, window: int | None) -> VarlenMask:
    """The mask of a batch, computed on its device.

    Args:
        starts_BL: the first position of each position's document.
        count: upper bound of the number of documents in all sequences.
        longest: upper bound of their lengths, at least 2.
        window: sliding-window size in tokens.
    """
    number_T = (starts_BL == _positions(starts_BL)).flatten().cumsum(0) - 1
    numbers = torch.arange(count + 1, device=starts_BL.device)
    return VarlenMask(torch.searchsorted(number_T, numbers, out_int32=True), longest, window)


@dataclass(frozen=True)
class FlexMask:
    """The documents of a batch, and the sliding window, for FlexAttention."""

    blocks: flex_attention.BlockMask

    def attend(self, q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor) -> Tensor:
        """Causal attention inside documents, out_BNLH."""
        # Within torch.compile, and on a CPU, whose tests need no compiler, FlexAttention is called as it is.
        plain = torch.compiler.is_compiling() or q_BNLH.device.type == "cpu"
        attention = flex_attention.flex_attention if plain else _compiled_flex_attention()
        grouped = k_BKLH.shape[1] < q_BNLH.shape[1]
        out_BNLH: Tensor = attention(q_BNLH, k_BKLH, v_BKLH, block_mask=self.blocks, enable_gqa=grouped)
        return out_BNLH


def flex_mask(starts_BL: Tensor, *, window: int | None) -> FlexMask:
    """The mask of a batch, computed on its device; see `varlen_mask`.

    A query attends to consecutive keys: from its document's first one, or the window's, to its own. Neither end
    decreases from one query to the next, so that two queries decide which blocks a block of queries attends to: the
    first one sees the earliest key of all, and the last one sees the fewest of the earlier keys.
    """
    length = starts_BL.shape[1]
    from_BL = starts_BL if window is None else torch.maximum(starts_BL, _positions(starts_BL) - (window - 1))
    blocks_W = torch.arange(-(-length // BLOCK), device=starts_BL.device)
    begin_W = blocks_W * BLOCK
    end_W = begin_W + BLOCK - 1
    earlier_WW = begin_W[:, None] > begin_W[None, :]
    some_BWW = (begin_W[:, None] >= begin_W[None, :]) & (end_W >= from_BL[:, begin_W, None])
    all_BWW = earlier_WW & (begin_W >= from_BL[:, end_W.clamp(max=length - 1), None])
    all_BWW = all_BWW & (end_W < length)[:, None]  # the last block may have fewer queries
    some, every = _ordered((some_BWW & ~all_BWW)[:, None]), _ordered(all_BWW[:, None])
    blocks = flex_attention.BlockMask.from_kv_blocks(
        *some, *every, BLOCK_SIZE=BLOCK, mask_mod=_mask_mod(from_BL), seq_lengths=(length, length)
    )
    return FlexMask(blocks)


@functools.cache
def _compiled_flex_attention() -> Any:
    """FlexAttention for runs without torch.compile: uncompiled, torch would compute all scores."""
    return torch.compile(flex_attention.flex_attention, dynamic=False)


def _mask_mod(from_BL: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's function of sequence, head and two positions: whether the query attends to the key."""

    def attends(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= from_BL[b, query])

    return attends


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention's form of a boolean matrix: the number of true columns of each row, and their indices first."""
    indices = dense.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32), indices.to(torch.int32)


def _positions(starts_BL: Tensor) -> Tensor:
    return torch.arange(starts_BL.shape[1], dtype=starts_BL.dtype, device=starts_BL.device)
