"""The kernel of attention inside documents: each gives the logits and gradients of the CPU's path in a whole model, the
choice among them follows device, dtype and settings, and what cannot be used is refused with its reason.
"""

import document_kernels_on_cpu as on_cpu
import pytest
import torch
import training

from titan_cpt.distributed import document_backend
from titan_cpt.distributed.activation_checkpoint import apply_ac
from titan_cpt.distributed.attention_timing import AttentionShape, choose_kernel
from titan_cpt.distributed.document_backend import (
    Circumstances,
    choose_document_backend,
    document_kernels_of,
    equal_documents,
    first_that_works,
    set_document_backend,
    why_not,
)
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.errors import ConfigError
from titan_cpt.models.build import build_model
from titan_cpt.models.common.document_attention import DocumentBounds, document_bounds
from titan_cpt.models.registry import named_size

pytestmark = [*training.THEIR_WARNINGS_IGNORED]
on_cpu.register_varlen()
ON_CPU = ProcessInfo(0, 1, torch.device("cpu"))
GPU = torch.device("cuda", 0)
PLAIN = Circumstances()
LENGTH = 200
STARTS_BL = torch.tensor([[0] * 3 + [3] * 1 + [4] * 140 + [144] * 56, [0] * 200], dtype=torch.int32)


def shape(dtype=torch.bfloat16, width=64):
    """Attention of one layer."""
    return AttentionShape(2, LENGTH, 4, 2, width, dtype)


def model_of(dtype, *, family="llama", **keys):
    """A small model with given weights."""
    changes = {"heads": 4, "kv_heads": 2, **keys} if family == "llama" else keys
    model = build_model(named_size(family, "debug", 257, changes))
    model.init_weights(seed=3)
    with torch.no_grad():
        for layer in model.attentions():
            for weight in layer.parameters():
                weight.mul_(8)  # so that what a token attends to matters
    return model.to(dtype)


def logits_and_gradients(model, *, backend=None, starts_BL=STARTS_BL, **arguments):
    """The logits, and all gradients of a function of them one after another, in float32."""
    if backend is not None:
        set_document_backend([model], backend)
    model.zero_grad()
    tokens_BL = torch.arange(2 * LENGTH).view(2, LENGTH) % 257
    with on_cpu.flex_backward():
        logits = model(tokens_BL, starts_BL=starts_BL, bounds=document_bounds(STARTS_BL), **arguments).float()
        logits.square().mean().backward()
    return [logits.detach(), torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])]


def off(found, right):
    """The largest error of a tensor, relative to its norm."""
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(found, right, strict=True))


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {}),
        ("llama", {"sliding_window": 24}),
        ("gpt_neox", {}),
        ("gemma3", {"layers": 2, "global_interval": 2, "sliding_window": 24}),  # two masks, two tables of RoPE
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("backend", "dtype", "error"),
    [("flash", torch.bfloat16, 0.06), ("flex", torch.float32, 1e-4), ("math", torch.float32, 1e-4)],
)
def test_a_model_has_the_logits_and_gradients_of_the_cpus_path(backend, dtype, error, family, keys):
    """In the same dtype; the positions restart at each document as well."""
    positions_BL = torch.arange(LENGTH, dtype=torch.int32) - STARTS_BL

    right = logits_and_gradients(model_of(dtype, family=family, **keys), positions_BL=positions_BL)
    found = logits_and_gradients(model_of(dtype, family=family, **keys), backend=backend, positions_BL=positions_BL)
    unmasked = logits_and_gradients(model_of(dtype, family=family, **keys), starts_BL=None)

    assert off(found, right) < error
    assert off(unmasked[:1], right[:1]) > 4 * error


@pytest.mark.parametrize(("recompute", "calls"), [("selective", 1), ("full", 2)])
def test_selective_checkpointing_keeps_the_output_of_the_flash_kernel(recompute, calls):
    """As it keeps that of torch's attention; full checkpointing computes it again. The gradients are the same."""
    plain = logits_and_gradients(model_of(torch.bfloat16), backend="flash")
    model = model_of(torch.bfloat16)
    layers = len(model.blocks)
    set_document_backend([model], "flash")
    apply_ac(model, ParallelOptions(torch.bfloat16, recompute=recompute))
    before = len(on_cpu.CALLS)
    found = logits_and_gradients(model)

    assert len(on_cpu.CALLS) - before == calls * layers
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


@pytest.fixture
def h100(monkeypatch):
    """A GPU of compute capability 9.0, and Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(document_backend.importlib.util, "find_spec", lambda _name: True)


@pytest.mark.parametrize(
    ("name", "of", "circumstances", "reason"),
    [
        ("flash", shape(), PLAIN, None),
        ("flash", shape(torch.float16), PLAIN, None),
        ("flash", shape(torch.float32), PLAIN, "in bfloat16 only"),
        ("flash", shape(width=12), PLAIN, "a multiple of 8, not 12"),
        ("flash", shape(width=264), PLAIN, "at most 256 features"),
        ("flash", shape(), Circumstances(cuda_graphs=True), "training.cuda_graphs replays those of one batch"),
        ("flash", shape(), Circumstances(selective_uncompiled=True), None),
        ("flex", shape(), PLAIN, None),
        ("flex", shape(torch.float32, width=12), PLAIN, "at least 16 features, not 12"),
        ("flex", shape(torch.float32), Circumstances(cuda_graphs=True), None),
        ("flex", shape(), Circumstances(selective_uncompiled=True), "compile.enable is true"),
        ("efficient", shape(torch.float32, width=12), Circumstances(cuda_graphs=True), None),
    ],
)
@pytest.mark.usefixtures("h100")
def test_a_kernel_can_be_used_or_there_is_a_reason(name, of, circumstances, reason):
    found = why_not(name, of, GPU, circumstances)

    assert found is None if reason is None else reason in found


def test_an_old_gpu_has_no_flash_kernel_and_a_build_without_triton_no_flex(monkeypatch):
    """Volta, and torch's CPU build."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 0))
    monkeypatch.setattr(document_backend.importlib.util, "find_spec", lambda _name: None)

    assert "compute capability 8.0" in why_not("flash", shape(), GPU, PLAIN)
    assert "Triton" in why_not("flex", shape(), GPU, PLAIN)
    assert why_not("efficient", shape(), GPU, PLAIN) is None


@pytest.mark.parametrize("requested", ["default", "flash", "fastest"])
def test_a_cpu_computes_document_by_document(requested):
    """No model changes, nothing is measured."""
    assert choose_document_backend(requested, None, model_of(torch.float32), shape(), ON_CPU, PLAIN) is None


def test_on_a_cpu_math_uses_a_boolean_mask():
    choice = choose_document_backend("math", None, model_of(torch.float32), shape(torch.float32), ON_CPU, PLAIN)

    assert (choice.backend, choice.note) == ("math", "")


def test_context_parallelism_has_its_own_kernel():
    circumstances = Circumstances(context_parallel=True)

    assert choose_document_backend("math", None, model_of(torch.float32), shape(), ON_CPU, circumstances) is None


def test_what_cannot_be_used_is_refused_with_the_reason_or_skipped():
    """What a GPU cannot compute in float32, and FlexAttention, which a CPU cannot differentiate."""
    of = shape(torch.float32)
    kernels = document_kernels_of(model_of(torch.float32), of, torch.device("cpu"), PLAIN)
    refusal = r'attention_backend: "flash" .*2 x 200 positions.*in bfloat16 only\. Available: math; or'

    with pytest.raises(ConfigError, match=refusal):
        choose_kernel("flash", None, kernels, of, ON_CPU, candidates=("flash", "flex", "math"))
    assert first_that_works(kernels, of, torch.device("cpu")) == "math"
    assert choose_kernel("fastest", "flash", kernels, of, ON_CPU, candidates=("flash", "math")).backend == "math"


def test_measured_documents_are_equal_and_their_bounds_right():
    starts_BL, bounds = equal_documents(torch.zeros(2, 1, 96, 8), documents=16)

    assert starts_BL[1].tolist() == [6 * (place // 6) for place in range(96)]
    assert bounds == DocumentBounds(32, 6)
