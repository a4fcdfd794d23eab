"""Attention inside documents by varlen and flex: the masks are the boolean mask's, and nothing waits for the device.

The kernels need a GPU (tests/gpu/test_masked_attention.py). tests/document_kernels_on_cpu.py says what stands in for
them.
"""

from functools import partial

import document_kernels_on_cpu as on_cpu
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from recorded_graphs import RecordedGraphs
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint

from titan_cpt.models.common.document_attention import document_bounds
from titan_cpt.models.common.document_kernels import BLOCK, flex_mask, varlen_mask

on_cpu.register_varlen()
lengths_of_documents = st.lists(st.integers(1, 200), min_size=1, max_size=8)


@st.composite
def batches(draw):
    """starts_BL of one to three sequences of the same length."""
    rows = [draw(lengths_of_documents) for _ in range(draw(st.integers(1, 3)))]
    length = min(map(sum, rows))
    return torch.stack([starts_of(row)[:length] for row in rows])


def starts_of(lengths):
    """The first position of each position's document, from the documents' lengths."""
    return torch.tensor([sum(lengths[:i]) for i, length in enumerate(lengths) for _ in range(length)]).int()


STARTS_BL = torch.stack([starts_of([1, 130, 1, 68, 200]), starts_of([400])])


def dense(starts_BL, window):
    """Whether a query attends to a key, [B, L, L], position by position from the definition."""
    place = torch.arange(starts_BL.shape[1])
    behind = place[:, None] - place[None, :]
    seen = (behind >= 0) & (starts_BL[:, :, None] == starts_BL[:, None, :])
    return seen if window is None else seen & (behind < window)


def inputs(starts_BL, *, heads=4, kv_heads=2, width=16, seed=0):
    """Queries, keys and values of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    B, L = starts_BL.shape
    return [torch.randn(B, n, L, width, generator=generator) for n in (heads, kv_heads, kv_heads)]


def expected(q, k, v, starts_BL, window):
    """Attention with the dense mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense(starts_BL, window)[:, None], enable_gqa=True)


@given(batches(), st.none() | st.integers(1, 300))
def test_flex_blocks_are_those_that_torch_finds_position_by_position(starts_BL, window):
    length = starts_BL.shape[1]

    def mask_mod(b, _head, query, key):
        behind = query - key
        seen = (behind >= 0) & (starts_BL[b, query] == starts_BL[b, key])
        return seen if window is None else seen & (behind < window)

    found = flex_mask(starts_BL, window=window).blocks
    torchs = flex_attention.create_block_mask(
        mask_mod, len(starts_BL), None, length, length, device="cpu", BLOCK_SIZE=BLOCK
    )

    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(torchs, name)), name
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        kept = torch.arange(getattr(found, indices).shape[-1]) < getattr(found, counts)[..., None]
        assert torch.equal(getattr(found, indices)[kept], getattr(torchs, indices)[kept]), indices
    assert found.seq_lengths == (length, length)
    mod = torch.vmap(
        torch.vmap(torch.vmap(found.mask_mod, (None, None, None, 0)), (None, None, 0, None)), (0, *[None] * 3)
    )
    place = torch.arange(length)
    assert torch.equal(mod(torch.arange(len(starts_BL)), torch.tensor(0), place, place), dense(starts_BL, window))


@given(batches(), st.none() | st.integers(1, 300), st.integers(0, 40))
def test_varlen_sequences_are_the_documents_and_then_empty(starts_BL, window, spare):
    documents = (starts_BL == torch.arange(starts_BL.shape[1])).sum().item()
    lengths = [count for row in starts_BL for count in row.unique(return_counts=True)[1].tolist()]

    mask = varlen_mask(starts_BL, count=documents + spare, longest=max(2, *lengths), window=window)

    assert mask.ends.dtype == torch.int32
    assert mask.ends.diff().tolist() == lengths + [0] * spare


def mask_of(kernel, starts_BL, window=None):
    """The mask of one of the two kernels."""
    if kernel == "flex":
        return flex_mask(starts_BL, window=window)
    return varlen_mask(starts_BL, count=512, longest=512, window=window)


def attend(q, k, v, mask):
    """A function to compile or checkpoint."""
    return mask.attend(2 * q, k, v)


def with_gradients(attention, q, k, v, *arguments):
    """Output and gradients of a function of queries, keys and values."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with on_cpu.flex_backward():
        out = attention(*leaves, *arguments)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, leaves, weights)


@given(batches())
def test_bounds_hold_for_the_documents_and_one_of_padding_in_each_sequence(starts_BL):
    """Rounded up to powers of two: less than twice as large, or the smallest values."""
    sequences, length = starts_BL.shape
    lengths = [count for row in starts_BL for count in row.unique(return_counts=True)[1].tolist()]
    count = len(lengths) + sequences

    bounds = document_bounds(starts_BL)

    assert count <= bounds.count <= max(16, 2 * count - 1)
    assert max(lengths) <= bounds.longest <= max(2, length)
    assert bounds.longest <= max(128, 2 * max(lengths) - 1)
    assert bounds.longest >= 2
    assert bounds.longest in (max(2, length), *(2**n for n in range(7, 20)))
    assert bounds.count in [2**n for n in range(4, 20)]


@pytest.mark.parametrize("window", [None, 1, 7, 128, 500])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_attention_and_gradients_equal_those_with_a_boolean_mask(kernel, kv_heads, window):
    """Documents of one token, across blocks, and a sequence of only one."""
    dtype, error = (torch.bfloat16, 0.03) if kernel == "varlen" else (torch.float32, 1e-5)
    q, k, v = (x.to(dtype) for x in inputs(STARTS_BL, kv_heads=kv_heads))

    found = with_gradients(lambda *x: mask_of(kernel, STARTS_BL, window).attend(*x), q, k, v)
    right = with_gradients(expected, *(x.float() for x in (q, k, v)), STARTS_BL, window)

    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.float(), other, atol=error, rtol=error)


@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_a_changed_document_changes_no_bit_of_the_others(kernel):
    q, k, v = (x.bfloat16() for x in inputs(STARTS_BL))
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[0, :, 1:131] += 1  # the second of five documents

    before, after = (
        with_gradients(lambda *x: mask_of(kernel, STARTS_BL).attend(*x), *each) for each in ((q, k, v), changed)
    )

    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[0, :, :1], other[0, :, :1])
        assert torch.equal(one[0, :, 131:], other[0, :, 131:])
        assert torch.equal(one[1], other[1])
        assert not torch.equal(one[0, :, 1:131], other[0, :, 1:131])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("kernel", "graphs"), [("varlen", 3), ("flex", 1)])
def test_other_documents_do_not_compile_again(kernel, graphs, checkpointed):
    """flex has one graph for all documents. In varlen's second and third one the longest document and the count, which
    have changed by then, are variables.
    """
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    block = partial(checkpoint, attend, use_reentrant=False) if checkpointed else attend
    compiled = torch.compile(block, backend=compiler, fullgraph=True)
    q, k, v = (x.bfloat16() for x in inputs(STARTS_BL))
    for lengths, count, longest in (([400], 16, 400), ([100] * 4, 16, 128), ([4] * 100, 256, 128), ([1, 399], 32, 399)):
        starts_BL = torch.stack([starts_of(lengths)] * 2)
        mask = flex_mask(starts_BL, window=None)
        if kernel == "varlen":
            mask = varlen_mask(starts_BL, count=count, longest=longest, window=None)
        for one, other in zip(*(with_gradients(f, q, k, v, mask) for f in (compiled, attend)), strict=True):
            assert torch.equal(one, other)
    assert compiler.frame_count == graphs


@pytest.mark.parametrize("window", [None, 5])
def test_a_replayed_graph_makes_flexs_mask_of_the_documents_that_the_tensor_then_has(window):
    """tests/recorded_graphs.py runs the operations again, on the same memory and without Python."""
    starts_BL, other_BL = STARTS_BL.clone(), STARTS_BL.flip(0)
    made = []
    replay = RecordedGraphs().capture(lambda: made.append(flex_mask(starts_BL, window=window)))
    starts_BL.copy_(other_BL)
    replay()

    found, right = made[0].blocks, flex_mask(other_BL, window=window).blocks
    length = STARTS_BL.shape[1]
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "q_num_blocks", "q_indices", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(right, name)), name
    seen = flex_attention.create_mask(found.mask_mod, 2, None, length, length, device="cpu")
    assert torch.equal(seen[:, 0], dense(other_BL, window))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_masks_and_attention_never_wait_for_the_device(kernel, window):
    """A fake tensor has no values: what reads one raises an error."""
    with FakeTensorMode():
        starts_BL = torch.zeros(2, 400, dtype=torch.int32)
        q, k, v = (torch.zeros(2, n, 400, 16, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2))
        mask = mask_of(kernel, starts_BL, window)
        if kernel == "flex":  # its kernel is compiled; uncompiled, torch computes all scores
            assert mask.blocks.kv_indices.shape == (2, 1, 4, 4)
            return
        out = mask.attend(q, k, v)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        with pytest.raises(DataDependentOutputException):
            starts_BL.max().item()

    assert (out.shape, out.dtype) == ((2, 4, 400, 16), torch.bfloat16)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
