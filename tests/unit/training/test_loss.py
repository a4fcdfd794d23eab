"""The summed cross-entropy: values by hand, torch's own answer, chunks that leave no trace, no whole fp32 copy."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from titan_cpt.data.batch import NO_TARGET
from titan_cpt.training import loss
from titan_cpt.training.loss import SourceSums, fused_linear_cross_entropy, summed_cross_entropy


def example(dtype, *, sequences=2, length=7, vocabulary=50):
    generator = torch.Generator().manual_seed(1)
    logits_BLV = (3 * torch.randn(sequences, length, vocabulary, generator=generator)).to(dtype).requires_grad_()
    targets_BL = torch.randint(0, vocabulary, (sequences, length), generator=generator)
    return logits_BLV, targets_BL


def reference(logits_BLV, targets_BL, scale):
    """Loss and gradient by torch in fp64."""
    exact_BLV = logits_BLV.detach().double().requires_grad_()
    total = F.cross_entropy(exact_BLV.flatten(0, 1), targets_BL.flatten(), reduction="sum")
    (total * scale).backward()
    return total.detach(), exact_BLV.grad


def test_values_by_hand():
    """Odds of 3 to 1 for the right token, then for the wrong one: ln(4/3) + ln(4) nats."""
    logits_BLV = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]])
    total = summed_cross_entropy(logits_BLV, torch.tensor([[1, 0]]))

    assert total.shape == ()
    assert total.item() == pytest.approx(math.log(4 / 3) + math.log(4), rel=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 14, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_torchs_whatever_the_chunks(dtype, chunk_tokens, monkeypatch):
    """Against fp64, on the same logits: 14 tokens in chunks that divide them, leave a rest, or are larger."""
    monkeypatch.setattr(loss, "CPU_CHUNK_ELEMENTS", 50 * chunk_tokens)
    logits_BLV, targets_BL = example(dtype)
    expected, expected_grad = reference(logits_BLV, targets_BL, scale=1 / 14)
    total = summed_cross_entropy(logits_BLV, targets_BL)
    (total / 14).backward()

    assert total.dtype is torch.float32
    assert logits_BLV.grad.dtype is dtype
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]  # bf16: rounded to the nearest, once
    torch.testing.assert_close(logits_BLV.grad.double(), expected_grad, rtol=tolerance, atol=1e-9)


def test_the_size_of_the_chunks_changes_no_bit(monkeypatch):
    """The tokens' losses are summed in one go, so that a CPU's and a GPU's chunks could be swapped."""
    logits_BLV, targets_BL = example(torch.bfloat16, length=300)
    totals, grads = [], []
    for chunk_tokens in (3, 600):
        monkeypatch.setattr(loss, "CPU_CHUNK_ELEMENTS", 50 * chunk_tokens)
        total = summed_cross_entropy(logits_BLV, targets_BL)
        totals.append(total.item())
        grads.append(torch.autograd.grad(total, logits_BLV)[0])

    assert totals[0] == totals[1]
    assert torch.equal(grads[0], grads[1])


def test_a_batch_is_the_sum_of_its_micro_batches():
    """Hence accumulation cannot change the loss."""
    logits_BLV, targets_BL = example(torch.float32, sequences=4)
    whole = summed_cross_entropy(logits_BLV, targets_BL)
    parts = [summed_cross_entropy(logits_BLV[i : i + 1], targets_BL[i : i + 1]) for i in range(4)]

    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-6, atol=0)


def test_the_loss_lowers_the_logits_of_padding_rows():
    """Rows of the vocabulary that no target names have a gradient above 0 everywhere: descent lowers them."""
    logits_BLV, targets_BL = example(torch.float32)
    summed_cross_entropy(logits_BLV, targets_BL % 40).backward()

    assert (logits_BLV.grad[..., 40:] > 0).all()


def test_no_fp32_copy_of_bf16_logits_is_ever_whole(monkeypatch):
    """The largest fp32 tensor made, forward or backward, has the size of a chunk."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype is torch.float32:
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(loss, "CPU_CHUNK_ELEMENTS", 100)
    logits_BLV, targets_BL = example(torch.bfloat16)
    with Watch():
        summed_cross_entropy(logits_BLV, targets_BL).backward()

    assert largest == 100


# Head and loss as one operation


def head_example(dtype, *, vocabulary=50, width=6):
    generator = torch.Generator().manual_seed(2)
    x_BLD = torch.randn(2, 7, width, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    return x_BLD, weight_VD, torch.randint(0, vocabulary, (2, 7), generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 14, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_the_fused_loss_is_the_loss_of_the_heads_logits(dtype, tolerance, chunk_tokens, monkeypatch):
    """Value and both gradients against torch in fp64 through whole logits; the result is scaled once more behind it."""
    monkeypatch.setattr(loss, "LOGITS_CHUNK", 50 * chunk_tokens)
    monkeypatch.setattr(loss, "CPU_CHUNK_ELEMENTS", 150)
    x_BLD, weight_VD, targets_BL = head_example(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x_BLD, weight_VD)]
    expected = F.cross_entropy(F.linear(*exact).flatten(0, 1), targets_BL.flatten(), reduction="sum") / 14
    (3 * expected).backward()
    share = fused_linear_cross_entropy(x_BLD, weight_VD, targets_BL=targets_BL, scale=1 / 14)
    (3 * share).backward()

    assert share.dtype is torch.float32
    assert share.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in ((x_BLD, exact[0]), (weight_VD, exact[1])):
        assert ours.grad.dtype is dtype
        assert (ours.grad - theirs.grad).norm() <= tolerance * theirs.grad.norm()


def test_the_softmax_for_torch_compile_gives_the_same(monkeypatch):
    """It runs only on CUDA, where the chunks of the other one would be many small kernels."""
    monkeypatch.setattr(loss, "CPU_CHUNK_ELEMENTS", 150)
    logits_CV = torch.randn(14, 50, generator=torch.Generator().manual_seed(3))
    targets_C = torch.arange(14)
    losses_C, grad_CV = loss._softmax_for_compile(logits_CV, targets_C, torch.tensor(0.5))
    chunked_losses_C, chunked_grad_CV = loss._softmax(logits_CV.clone(), targets_C, 0.5)

    torch.testing.assert_close(losses_C, chunked_losses_C, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_CV, chunked_grad_CV, rtol=1e-5, atol=1e-7)


def test_the_logits_of_all_tokens_never_exist(monkeypatch):
    """The largest tensor made, forward or backward, is a chunk of logits or the head's weight."""
    sizes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.update([result.numel()] if isinstance(result, torch.Tensor) else [])
            return result

    monkeypatch.setattr(loss, "LOGITS_CHUNK", 100)
    x_BLD, weight_VD, targets_BL = head_example(torch.bfloat16)
    with Watch():
        fused_linear_cross_entropy(x_BLD, weight_VD, targets_BL=targets_BL, scale=1.0).backward()

    assert max(sizes) == 300


# Losses by source


@pytest.mark.parametrize("fused", [True, False])
def test_losses_are_added_to_the_sums_of_their_sources(fused):
    """Three sequences of sources 2, 0, 2; one target is ignored; source 1 has none. Sums of torch's losses in fp64."""
    generator = torch.Generator().manual_seed(5)
    x_BLD, weight_VD = torch.randn(3, 4, 6, generator=generator), torch.randn(20, 6, generator=generator)
    targets_BL = torch.randint(0, 20, (3, 4), generator=generator)
    targets_BL[2, 3] = -1
    logits_BVL = (x_BLD @ weight_VD.t()).double().transpose(1, 2)
    losses_BL = F.cross_entropy(logits_BVL, targets_BL, reduction="none", ignore_index=-1)
    sums_S2 = torch.full((4, 2), 1.0, dtype=torch.float64)
    by_source = SourceSums(sums_S2, torch.tensor([2, 0, 2]))
    if fused:
        fused_linear_cross_entropy(x_BLD, weight_VD, targets_BL=targets_BL, scale=0.5, by_source=by_source)
    else:
        summed_cross_entropy(x_BLD @ weight_VD.t(), targets_BL, by_source=by_source)

    expected = [[losses_BL[1].sum(), 4.0], [0.0, 0.0], [losses_BL[[0, 2]].sum(), 7.0], [0.0, 0.0]]
    torch.testing.assert_close(sums_S2 - 1.0, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_sources_nan_does_not_reach_the_other_sources():
    """So the log shows which source it came from."""
    logits_BLV = torch.zeros(2, 1, 4)
    logits_BLV[0] = torch.nan
    sums_S2 = torch.zeros(2, 2, dtype=torch.float64)
    summed_cross_entropy(logits_BLV, torch.tensor([[1], [1]]), by_source=SourceSums(sums_S2, torch.tensor([0, 1])))

    assert sums_S2[0].isnan().tolist() == [True, False]
    assert sums_S2[1].tolist() == pytest.approx([math.log(4), 1.0])


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_tokens", [5, 100])
def test_on_a_gpu_the_heads_gradient_is_summed_in_float32(chunk_tokens, monkeypatch):
    """bf16 operands, float32 gradient: within bf16's error of the logits' gradient, and not a bf16 number."""
    monkeypatch.setattr(loss, "logits_chunk", lambda _: 50 * chunk_tokens)
    x_BLD, weight_VD, targets_BL = head_example(torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x_BLD, weight_VD)]
    (F.cross_entropy(F.linear(*exact).flatten(0, 1), targets_BL.flatten(), reduction="sum") / 14).backward()
    x_BLD, weight_VD = (tensor.detach().cuda().requires_grad_() for tensor in (x_BLD, weight_VD))
    weight_VD.grad_dtype = torch.float32
    fused_linear_cross_entropy(x_BLD, weight_VD, targets_BL=targets_BL.cuda(), scale=1 / 14).backward()

    assert weight_VD.grad.dtype is torch.float32
    assert not torch.equal(weight_VD.grad, weight_VD.grad.bfloat16().float())
    assert (weight_VD.grad.cpu() - exact[1].grad).norm() <= 2**-7 * exact[1].grad.norm()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
@pytest.mark.parametrize("fused", [False, True])
def test_positions_without_a_target_do_not_count(fused, chunk_tokens, monkeypatch):
    """Loss and gradients are those of a batch without these positions, and their own gradient is zero."""
    monkeypatch.setattr(loss, "CPU_CHUNK_ELEMENTS", 50 * chunk_tokens)
    generator = torch.Generator().manual_seed(2)
    x_BLD = torch.randn(1, 9, 6, generator=generator)
    weight_VD = torch.randn(50, 6, generator=generator)
    targets_BL = torch.randint(0, 50, (1, 9), generator=generator)
    kept = torch.tensor([0, 1, 3, 4, 7])
    with_gaps_BL = torch.full_like(targets_BL, NO_TARGET).index_copy(1, kept, targets_BL[:, kept])

    def loss_and_gradients(x_BLD, targets_BL):
        x_BLD, weight = x_BLD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        if fused:
            total = fused_linear_cross_entropy(x_BLD, weight, targets_BL=targets_BL, scale=1 / 5)
        else:
            total = summed_cross_entropy(x_BLD @ weight.t(), targets_BL) / 5
        total.backward()
        return total.detach(), x_BLD.grad, weight.grad

    total, grad_x, grad_weight = loss_and_gradients(x_BLD, with_gaps_BL)
    expected, expected_x, expected_weight = loss_and_gradients(x_BLD[:, kept], targets_BL[:, kept])

    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_x[:, kept], expected_x, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad_weight, expected_weight, rtol=1e-5, atol=1e-7)
    assert not grad_x[0, [2, 5, 6, 8]].any()
    assert loss_and_gradients(x_BLD, torch.full_like(targets_BL, NO_TARGET))[0] == 0


def test_the_compiled_softmax_is_compiled_once_however_the_tokens_of_a_step_vary(monkeypatch):
    """Six scales give one graph, which torch's eager backend runs; losses and gradients are those of the plain one."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    softmax = loss._compiled_softmax.__wrapped__()
    logits, targets = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 0, 15, -1, 7])
    for tokens in range(100, 106):
        found, expected = (of(logits.clone(), targets, 1 / tokens) for of in (softmax, loss._softmax))
        torch.testing.assert_close(found, expected)

    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("chunk_tokens", [4, 1000])
def test_a_frozen_head_or_input_gets_no_gradient_and_the_other_the_same(chunk_tokens, monkeypatch):
    """A frozen head's gradient is not computed, nor that of the input of a head below which nothing is trained."""
    monkeypatch.setattr(loss, "LOGITS_CHUNK", 50 * chunk_tokens)
    shares = []
    monkeypatch.setattr(loss, "_share_of_weight", lambda *given, f=loss._share_of_weight: shares.append(1) or f(*given))
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(2, 7, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 50, (2, 7), generator=generator)
    found = {}
    for trained in ("both", "x", "weight"):
        operands = [x.clone().requires_grad_(trained != "weight"), weight.clone().requires_grad_(trained != "x")]
        computed = len(shares)
        fused_linear_cross_entropy(*operands, targets_BL=targets, scale=0.5).backward()
        found[trained] = [operand.grad for operand in operands]
        assert (len(shares) > computed) == (trained != "x")

    assert torch.equal(found["x"][0], found["both"][0])
    assert found["x"][1] is None
    assert found["weight"][0] is None
    assert torch.equal(found["weight"][1], found["both"][1])
