"""The kernels of titan_cpt/models/common/document_kernels.py on a CPU, for tests.

varlen_attn gets what torch documents of it, written with plain operations, as its operator's CPU kernels; they refuse
what the flash kernel refuses. FlexAttention has a CPU forward pass and, uncompiled, a backward pass of plain operations
that torch does not release for CPUs.
"""

import math
import warnings
from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn.attention import flex_attention, varlen

CALLS = []
"""Shapes of each forward call of varlen_attn's operator."""


def _weights(q, k, window):
    """Softmax of the scores of one sequence, [N, L, L]: window[0] keys before the query and window[1] after it."""
    behind = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])[None, :]
    left, right = window
    seen = (behind <= left) | (left < 0)
    seen &= (-behind <= right) | (right < 0)
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return scores.softmax(-1)


def _sequences(ends, *tensors):
    """The float32 heads x positions x width of each sequence of the packed tensors."""
    for begin, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        yield begin, end, *(x[begin:end].transpose(0, 1).float() for x in tensors)


def _forward(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *rest):
    CALLS.append({"count": len(cu_q) - 1, "longest": max_q, "window": tuple(window_size)})
    assert query.dtype in (torch.bfloat16, torch.float16), "the flash kernel has no other dtype"
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] <= 256
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.is_contiguous()
    assert torch.equal(cu_q, cu_k)
    assert cu_q[0] == 0
    assert cu_q[-1] == len(query), "gradients of tokens after the last sequence are undefined (pytorch issue 176793)"
    assert 0 <= cu_q.diff().min() <= cu_q.diff().max() <= max_q == max_k
    assert max_q >= 2, "for one token torch regroups the heads, which fails with empty sequences"
    assert is_causal == (tuple(window_size) == (-1, 0))
    assert scale is None
    # In torch 2.11 the operator has no further arguments and documents no grouped-query attention.
    assert (rest[0] if rest else False) == (query.shape[1] > key.shape[1])
    out = torch.empty_like(query)
    for begin, end, q, k, v in _sequences(cu_q, query, key, value):
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
        out[begin:end] = (_weights(q, k, window_size) @ v).transpose(0, 1)
    return out, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def _backward(grad, query, key, value, _out, _lse, cu_q, _cu_k, _max_q, _max_k, _causal, _rng, _scale, window, *_):
    grads = [torch.empty_like(x) for x in (query, key, value)]
    for begin, end, q, k, v, d_out in _sequences(cu_q, query, key, value, grad):
        kv_heads, scale = k.shape[0], 1 / math.sqrt(q.shape[-1])
        k, v = (x.repeat_interleave(q.shape[0] // kv_heads, dim=0) for x in (k, v))
        weights = _weights(q, k, window)
        d_weights = d_out @ v.transpose(1, 2)
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True))
        d_key, d_value = d_scores.transpose(1, 2) @ q * scale, weights.transpose(1, 2) @ d_out
        d_key, d_value = (x.unflatten(0, (kv_heads, -1)).sum(1) for x in (d_key, d_value))
        for whole, part in zip(grads, (d_scores @ k * scale, d_key, d_value), strict=True):
            whole[begin:end] = part.transpose(0, 1)
    return tuple(grads)


def register_varlen():
    """Give varlen_attn's operator CPU kernels in this process; may be called again."""
    if "cpu" not in varlen._varlen_attn._backend_fns:
        varlen._varlen_attn.register_kernel("cpu", _forward)
        varlen._varlen_attn_backward.register_kernel("cpu", _backward)


def _accept(*_):
    """Any device; a function, which torch.compile can trace."""


@contextmanager
def flex_backward():
    """Let FlexAttention differentiate on a CPU."""
    with warnings.catch_warnings(), mock.patch.object(flex_attention, "_validate_device", _accept):
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # read by torch's compiler
        yield
