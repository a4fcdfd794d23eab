"""Causal attention that stays inside each document of a sequence.

One tensor describes the documents of a sequence, `starts`: for every position, the first position of its document.
Position p attends to start(p) ... p, with a sliding window to the last `window` of them. That form is the same for
every kernel, has the shape of the tokens (so that it is sharded and split into micro-batches as they are), and says for
a part of the positions what its queries may attend to.

On a CPU `_attention` calls torch's attention kernel document by document. Consecutive short documents share a call with
a mask, since a call has a fixed cost; measured by scripts/bench/documents.py. It is one operator for autograd and for
torch.compile, which therefore neither unroll the loop nor compile again for other documents.

On a GPU `Documents.kernel_masks` has the kernels (document_kernels.py). Without them, torch's attention gets the mask
as a boolean matrix: exact on every device, but it computes all pairs of positions, as context parallelism on a GPU
does.

Shape letters: B sequences, L positions, P positions of the queries, S positions of the keys, N query heads, K key/value
heads, H head width, R half of a head's rotated features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from titan_cpt.models.common.ops import attended_in_float32, attention

_SHARED_CALL = 64  # consecutive documents share a call up to this number of positions
_WINDOW_TILE = 128  # least number of queries of a call if a document is longer than the sliding window


class KernelMask(Protocol):
    """The documents of a batch in the form of a GPU's kernel."""

    def attend(self, q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor) -> Tensor:
        """Causal attention within documents over whole sequences, out_BNLH."""


@dataclass(frozen=True)
class DocumentBounds:
    """Upper bounds of a batch's documents that the host knows without waiting for a GPU.

    They are powers of two, so that few values occur: torch.compile may compile for each.

    Attributes:
        count: documents in all sequences, and one of padding in each.
        longest: tokens of the longest one, at most L.
    """

    count: int
    longest: int


def document_bounds(starts_BL: Tensor) -> DocumentBounds:
    """The bounds of a batch in the host's memory.

    Args:
        starts_BL: first position of each position's document.
    """
    assert starts_BL.device.type == "cpu", "reading them from a GPU would wait for it"
    length = starts_BL.shape[1]
    places_L = torch.arange(length, dtype=torch.int32)
    count = int((starts_BL == places_L).sum())
    longest = int((places_L - starts_BL).max()) + 1
    count += len(starts_BL)  # of padding
    return DocumentBounds(max(16, _power_of_two(count)), min(max(128, _power_of_two(longest)), max(2, length)))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Documents:
    """What all layers of a forward pass need to know of the documents; `shared_documents` computes it once.

    Attributes:
        starts_BP: for each of this rank's positions, the first position of its document in the whole sequence, int32;
            None if attention crosses the borders of documents.
        tables_B1PR: RoPE's cosines and sines, of each of the model's `ModelSpec.ropes`, if positions restart at each
            document; empty if they count from the sequence's start.
        kernel_masks: for a GPU's kernel, by sliding-window size; empty: see `document_attention`.
    """

    starts_BP: Tensor | None
    tables_B1PR: tuple[tuple[Tensor, Tensor], ...] = ()
    kernel_masks: Mapping[int | None, KernelMask] = field(default_factory=dict)


def document_attention(
    q_BNPH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    documents: Documents,
    window: int | None,
    first: int = 0,
    offset: int = 0,
    backend: SDPBackend | None = None,
) -> Tensor:
    """Causal attention within documents, out_BNPH in the dtype of the queries.

    Args:
        q_BNPH: rotated queries of P consecutive positions, a part of this rank's or all of them.
        k_BKSH: rotated keys of the positions 0 to S - 1; S is at least first + P.
        v_BKSH: their values.
        documents: those of this rank's positions; with a mask.
        window: sliding-window size in tokens; None for full causal attention.
        first: position of the first query in the whole sequence.
        offset: number of this rank's positions before the first query: 0, or under context parallelism the size of its
            early chunk for its late one.
        backend: the kernel of torch's attention with a boolean mask, which is then used on a CPU too; None: torch
            chooses.
    """
    assert documents.starts_BP is not None, "attention that crosses documents does not come here"
    if documents.kernel_masks:
        assert (first, offset) == (0, 0), "these kernels take whole sequences"
        return documents.kernel_masks[window].attend(q_BNPH, k_BKSH, v_BKSH)
    starts_BP = documents.starts_BP[:, offset : offset + q_BNPH.shape[2]]
    if backend is not None or q_BNPH.device.type != "cpu":
        return _masked_attention(q_BNPH, k_BKSH, v_BKSH, starts_BP, first=first, window=window, backend=backend)
    out_BNPH: Tensor
    out_BNPH, _ = _attention(q_BNPH, k_BKSH, v_BKSH, starts_BP, first, window or 0, torch.is_grad_enabled())
    return out_BNPH


def _masked_attention(
    q_BNPH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    starts_BP: Tensor,
    *,
    first: int,
    window: int | None,
    backend: SDPBackend | None,
) -> Tensor:
    """`document_attention` with a boolean matrix."""
    places_P = torch.arange(first, first + q_BNPH.shape[2], dtype=torch.int32, device=q_BNPH.device)
    keys_S = torch.arange(k_BKSH.shape[2], dtype=torch.int32, device=q_BNPH.device)
    from_BP = starts_BP if window is None else torch.maximum(starts_BP, places_P - (window - 1))
    seen_BPS = (keys_S <= places_P[:, None]) & (keys_S >= from_BP[:, :, None])
    group = q_BNPH.shape[1] // k_BKSH.shape[1]
    # Fused kernels with a mask need as many key heads as query heads.
    k_BNSH, v_BNSH = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k_BKSH, v_BKSH))
    return attention(q_BNPH, k_BNSH, v_BNSH, backend=backend, attn_mask=seen_BPS[:, None])


class _Call(NamedTuple):
    """One call of the kernel: queries `begin` to `end` (of P) of some sequences, which attend to keys `key` to `last`.

    Attributes:
        causal: the queries are one whole document, so that the kernel's own causal mask is the right one.
    """

    begin: int
    end: int
    key: int
    last: int
    causal: bool


def _calls(starts_P: list[int], first: int, window: int) -> tuple[_Call, ...]:
    """The calls for one sequence, from the first position of each query's document."""
    count = len(starts_P)
    borders = [0, *(place for place in range(1, count) if starts_P[place] != starts_P[place - 1]), count]
    calls: list[_Call] = []
    for begin, end in pairwise(borders):
        start = starts_P[begin]
        if window and first + end - start > window:
            calls += _windowed_calls(begin, end, start, first, window)
        elif calls and calls[-1].end - calls[-1].begin + end - begin <= _SHARED_CALL and calls[-1].last == start:
            calls[-1] = _Call(calls[-1].begin, end, calls[-1].key, first + end, causal=False)
        else:
            calls.append(_Call(begin, end, start, first + end, causal=start == first + begin))
    return tuple(calls)


def _windowed_calls(begin: int, end: int, start: int, first: int, window: int) -> Iterator[_Call]:
    """The calls for a document that is longer than the sliding window: tiles of queries with the keys they can see."""
    tile = max(window, _WINDOW_TILE)
    for tile_begin in range(begin, end, tile):
        tile_end = min(tile_begin + tile, end)
        yield _Call(tile_begin, tile_end, max(start, first + tile_begin - window + 1), first + tile_end, causal=False)


def _by_sequences(starts_BP: Tensor, first: int, window: int) -> Iterator[tuple[slice, tuple[_Call, ...]]]:
    """Consecutive sequences with the same documents, and the calls for them."""
    found: list[list[int]] = starts_BP.tolist()
    begin = 0
    for end in range(1, len(found) + 1):
        if end == len(found) or found[end] != found[begin]:
            yield slice(begin, end), _calls(found[begin], first, window)
            begin = end


def _mask(starts_BP: Tensor, call: _Call, first: int, window: int, dtype: torch.dtype) -> Tensor | None:
    """0 where a query of a call sees a key, else -inf, [1, 1, queries, keys]; None if the kernel's mask is right."""
    if call.causal:
        return None
    keys_S = torch.arange(call.key, call.last, dtype=torch.int32)
    places_P = torch.arange(first + call.begin, first + call.end, dtype=torch.int32)
    from_P = starts_BP[0, call.begin : call.end]  # the same documents in all sequences of the call
    if window:
        from_P = torch.maximum(from_P, places_P - (window - 1))
    seen_PS = (keys_S >= from_P[:, None]) & (keys_S <= places_P[:, None])
    return torch.zeros(seen_PS.shape, dtype=dtype).masked_fill_(~seen_PS, -torch.inf)[None, None]


@torch.library.custom_op("titan_cpt::document_attention", mutates_args=(), device_types="cpu")
def _attention(
    q_BNPH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, starts_BP: Tensor, first: int, window: int, trained: bool
) -> tuple[Tensor, Tensor]:
    """Attention's output out_BNPH, and the logarithms of the softmax's sums, fp32 [B, N, P]."""
    out_BNPH = _empty_output(q_BNPH)
    sums_BNP = _empty_sums(q_BNPH)
    for rows, calls in _by_sequences(starts_BP, first, window):
        for call in calls:
            queries, keys = slice(call.begin, call.end), slice(call.key, call.last)
            dtype = _dtype(q_BNPH, call, trained)
            out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_BNPH[rows, :, queries].to(dtype),
                k_BKSH[rows, :, keys].to(dtype),
                v_BKSH[rows, :, keys].to(dtype),
                0.0,
                call.causal,
                attn_mask=_mask(starts_BP[rows], call, first, window, dtype),
            )
            out_BNPH[rows, :, queries] = out
            sums_BNP[rows, :, queries] = sums
    return out_BNPH, sums_BNP


@torch.library.custom_op("titan_cpt::document_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad_BNPH: Tensor,
    q_BNPH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    starts_BP: Tensor,
    out_BNPH: Tensor,
    sums_BNP: Tensor,
    first: int,
    window: int,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values. Those of keys that several calls see are summed in fp32."""
    grad_q = torch.empty_like(q_BNPH, memory_format=torch.contiguous_format)
    sum_dtype = torch.float32 if window else k_BKSH.dtype
    grad_k = torch.zeros(k_BKSH.shape, dtype=sum_dtype)
    grad_v = torch.zeros(v_BKSH.shape, dtype=sum_dtype)
    for rows, calls in _by_sequences(starts_BP, first, window):
        for call in calls:
            queries, keys = slice(call.begin, call.end), slice(call.key, call.last)
            dtype = _dtype(q_BNPH, call, trained)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_BNPH[rows, :, queries].to(dtype),
                q_BNPH[rows, :, queries].to(dtype),
                k_BKSH[rows, :, keys].to(dtype),
                v_BKSH[rows, :, keys].to(dtype),
                out_BNPH[rows, :, queries].to(dtype),
                sums_BNP[rows, :, queries],
                0.0,
                call.causal,
                attn_mask=_mask(starts_BP[rows], call, first, window, dtype),
            )
            grad_q[rows, :, queries] = grads[0]
            grad_k[rows, :, keys] += grads[1]
            grad_v[rows, :, keys] += grads[2]
    return grad_q, grad_k.to(k_BKSH.dtype), grad_v.to(v_BKSH.dtype)


def _dtype(q_BNPH: Tensor, call: _Call, trained: bool) -> torch.dtype:
    """The dtype in which a call computes."""
    in_float32 = attended_in_float32(q_BNPH, length=call.end - call.begin, trained=trained)
    return torch.float32 if in_float32 else q_BNPH.dtype


def _empty_output(q_BNPH: Tensor) -> Tensor:
    sequences, heads, length, width = q_BNPH.shape
    return q_BNPH.new_empty(sequences, length, heads, width).transpose(1, 2)  # the layout of torch's kernels


def _empty_sums(q_BNPH: Tensor) -> Tensor:
    sequences, heads, length, _ = q_BNPH.shape
    return q_BNPH.new_empty(sequences, length, heads, dtype=torch.float32).transpose(1, 2)


@_attention.register_fake
def _(q_BNPH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(q_BNPH), _empty_sums(q_BNPH)


@_attention_backward.register_fake
def _(grad_BNPH: Tensor, q_BNPH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shaped = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BNPH, k_BKSH, v_BKSH))
    grad_q, grad_k, grad_v = shaped
    return grad_q, grad_k, grad_v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BNPH, k_BKSH, v_BKSH, starts_BP, *ctx.how = inputs
    ctx.save_for_backward(q_BNPH, k_BKSH, v_BKSH, starts_BP, *output)


def _differentiate(ctx: Any, grad_BNPH: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q_BNPH, k_BKSH, v_BKSH, starts_BP, out_BNPH, sums_BNP = ctx.saved_tensors
    grads = _attention_backward(grad_BNPH, q_BNPH, k_BKSH, v_BKSH, starts_BP, out_BNPH, sums_BNP, *ctx.how)
    return (*grads, None, None, None, None)


_attention.register_autograd(_differentiate, setup_context=_save)
