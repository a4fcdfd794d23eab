"""Attention within documents: the sums by hand, independent documents to the last bit, and transformers' 4D mask."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from titan_cpt.distributed.activation_checkpoint import apply_ac
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.models.build import build_model
from titan_cpt.models.common import document_attention as attention
from titan_cpt.models.common.document_attention import Documents
from titan_cpt.models.registry import named_size
from unit.models.llama.test_model import in_transformers

LENGTHS = (23, 1, 40, 32)  # of the documents in 96 positions
YARN = {"kind": "yarn", "factor": 4.0, "original_seq_len": 16}
MODELS = {
    "llama": ("llama", {"heads": 4, "kv_heads": 2}),
    "windowed": ("llama", {"sliding_window": 9, "heads": 4, "kv_heads": 1}),
    "qwen3": ("llama", {"qk_norm": True, "rope_scaling": YARN}),
    "olmo3": ("olmo", {"sliding_window": 9, "global_interval": 2, "rope_scaling": YARN}),
    "smollm3": ("smollm3", {"layers": 2, "nope_interval": 2}),
    "gemma3": ("gemma3", {"layers": 2, "global_interval": 2, "sliding_window": 9}),
    "gpt_neox": ("gpt_neox", {}),
}


def model_of(name, dtype=torch.float32):
    family, overrides = MODELS[name]
    model = build_model(named_size(family, "debug", 257, overrides))
    model.init_weights(3)
    return model.to(dtype)


def starts_of(*rows):
    """Of each position of the rows, given the lengths of their documents, empty ones included."""
    starts = [[sum(lengths[:d]) for d, length in enumerate(lengths) for _ in range(length)] for lengths in rows]
    return torch.tensor(starts, dtype=torch.int32)


def by_hand(q, k, v, starts, first, window):
    """Softmax over the visible keys of each query, in float64, without torch's attention."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    query, key = torch.arange(first, first + q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    seen = (key >= starts[:, :, None]) & (key <= query) & (query - key < (window or k.shape[2]))
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1) @ v


def heads(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


@example(rows=[[0], [2]], window=None, part=(1, 2))  # the same calls in both rows, but not the same documents
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 220), min_size=1, max_size=30), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 5, 130, 1000]),
    part=st.tuples(st.integers(0, 230), st.integers(1, 230)),
)
def test_output_and_gradients_are_those_by_hand(rows, window, part):
    """Of rows of 230 positions, or of consecutive positions of them, whose keys begin before; 4 heads on 2."""
    rows = [[*lengths, 230] for lengths in rows]
    first = min(part[0], 229)
    count = min(part[1], 230 - first)
    starts = torch.stack([starts_of(lengths)[0, :230] for lengths in rows])[:, first : first + count]
    sequences = len(rows)
    inputs = heads((sequences, 4, count, 8), (sequences, 2, 230, 8), (sequences, 2, 230, 8))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    documents = Documents(starts)
    out = attention.document_attention(*inputs, documents=documents, window=window, first=first)
    expected = by_hand(*exact, starts, first, window)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights).sum(), exact)

    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 40])
def test_bfloat16_is_as_exact_as_it_can_hold(window):
    """Documents of 300 positions are computed in bfloat16, those of 20 in float32: both within bfloat16's rounding."""
    sizes = ((1, 4, 400, 64), (1, 2, 400, 64), (1, 2, 400, 64))
    inputs = heads(*sizes, dtype=torch.bfloat16)
    starts = starts_of((300, 20, 20, 60))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = attention.document_attention(*inputs, documents=Documents(starts), window=window)
    expected = by_hand(*exact, starts, 0, window)
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    expected_grads = torch.autograd.grad(expected.square().sum(), exact)

    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad.double() - expected_grad).norm() < 2e-2 * expected_grad.norm()


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_the_operators_pass_torchs_opcheck(operation):
    """Schema, shapes of what is not computed, and gradients under tracing are those of the operators themselves."""
    told = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    q, k, v = heads((2, 4, 50, 8), (2, 2, 50, 8), (2, 2, 50, 8))
    arguments = (q, k, v, starts_of((20, 30), (50,)), 0, 7, True)
    checked = attention._attention
    if operation == "backward":
        detached = tuple(x.detach() for x in arguments[:3])
        out, sums = attention._attention(*detached, *arguments[3:])
        arguments = (out, *detached, arguments[3], out, sums, *arguments[4:])
        checked = attention._attention_backward
    found = torch.library.opcheck(checked, arguments, test_utils=told)

    assert set(found.values()) == {"SUCCESS"}


def test_short_documents_share_calls_and_equal_rows_too():
    """33 documents of 2 tokens in two rows: calls of 64 and 2 queries, for both rows at once."""
    found = list(attention._by_sequences(starts_of((2,) * 33, (2,) * 33), 0, 0))

    assert [(rows, [(call.begin, call.end) for call in calls]) for rows, calls in found] == [
        (slice(0, 2), [(0, 64), (64, 66)])
    ]


def second_document(model, tokens, restarted):
    """Logits of the third document of two rows, and the gradients of all weights from its loss."""
    starts = starts_of(LENGTHS, LENGTHS)
    positions = torch.arange(96, dtype=torch.int32) - starts if restarted else None
    logits = model(tokens, starts_BL=starts, positions_BL=positions)[:, 24:64]
    model.zero_grad()
    logits.float().logsumexp(-1).sum().backward()
    return [logits.detach(), *(weight.grad.clone() for weight in model.parameters())]


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_another_document_changes_no_bit(name, dtype, recompute):
    """All tokens before the document, and after it: logits and gradients of the document are equal bit for bit."""
    model = model_of(name, dtype)
    apply_ac(model, ParallelOptions(precision=dtype, recompute=recompute))
    tokens = torch.randint(0, 257, (2, 96), generator=torch.Generator().manual_seed(5))
    others = (tokens + 1) % 257
    others[:, 24:64] = tokens[:, 24:64]
    restarted = name != "llama"
    before, after = (second_document(model, given_tokens, restarted) for given_tokens in (tokens, others))

    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_without_the_mask_another_document_does_change_them():
    """What the mask is for."""
    model = model_of("llama")
    tokens = torch.randint(0, 257, (1, 96), generator=torch.Generator().manual_seed(5))

    assert not torch.equal(model(tokens)[:, 64:], model((tokens + (torch.arange(96) < 23)) % 257)[:, 64:])


@pytest.mark.parametrize("restarted", [False, True], ids=["positions of the row", "positions restart"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_documents_run_one_by_one(name, restarted):
    """Each document in its own row, at its own positions, without a mask."""
    model = model_of(name)
    tokens = torch.randint(0, 257, (1, 96), generator=torch.Generator().manual_seed(5))
    starts = starts_of(LENGTHS)
    positions = torch.arange(96, dtype=torch.int32) - starts
    found = model(tokens, starts_BL=starts, positions_BL=positions if restarted else None)
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
    grads = torch.autograd.grad((found * weights).sum(), list(model.parameters()))
    separate = []
    for begin, end in ((0, 23), (23, 24), (24, 64), (64, 96)):
        own = None if restarted else torch.arange(begin, end)[None]
        separate.append(model(tokens[:, begin:end], positions_BL=own))
    expected = torch.cat(separate, dim=1)
    expected_grads = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=2e-4, rtol=1e-4)


def test_one_document_is_attention_without_a_mask():
    """The same kernel on the same numbers: bit for bit."""
    for name in ("llama", "gpt_neox"):
        model = model_of(name)
        tokens = torch.randint(0, 257, (3, 96), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            assert torch.equal(model(tokens, starts_BL=starts_of((96,), (96,), (96,))), model(tokens))


@pytest.mark.parametrize("restarted", [False, True])
def test_logits_are_those_of_transformers_with_a_4d_mask(restarted, tmp_path):
    """position_ids and a boolean mask of [rows, 1, queries, keys] in LlamaForCausalLM."""
    model = model_of("llama")
    tokens = torch.randint(0, 257, (2, 96), generator=torch.Generator().manual_seed(5))
    starts = starts_of(LENGTHS, (96,))
    places = torch.arange(96)
    seen = (places[None, None] >= starts[:, :, None]) & (places[None, None] <= places[None, :, None])
    positions = places - starts if restarted else places.expand(2, 96)
    theirs = in_transformers(model, tmp_path)
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=seen[:, None], position_ids=positions.long()).logits
        found = model(tokens, starts_BL=starts, positions_BL=positions if restarted else None)

    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=2e-5, rtol=1e-4)
