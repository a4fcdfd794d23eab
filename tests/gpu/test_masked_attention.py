"""Attention inside documents on a GPU: flash and flex against the CPU's path, exact borders, no waiting, whole runs."""

import os
import subprocess
import sys

import pytest
import torch
import training
from gpu.test_training import BF16, COMPILED, DETERMINISTIC, config, largest_difference, run  # noqa: F401

from titan_cpt.distributed.document_backend import set_document_backend
from titan_cpt.models.build import build_model
from titan_cpt.models.common.document_attention import Documents, document_attention, document_bounds
from titan_cpt.models.common.document_kernels import flex_mask, kernel_mask, varlen_mask
from titan_cpt.models.registry import named_size

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # CUDA's libraries warn of their own settings

LENGTHS = ((1, 130, 1, 68, 200), (400,))  # of the documents of two sequences: of one token, across blocks, a whole one
STARTS_BL = torch.tensor([[sum(row[:i]) for i, n in enumerate(row) for _ in range(n)] for row in LENGTHS]).int()
KERNELS = (("flash", torch.bfloat16), ("flex", torch.bfloat16), ("flex", torch.float32))
MASKED = {"training": {"document_mask": True, "seq_len": 200}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tokens of two languages, in documents of 30 to 90."""
    folder = tmp_path_factory.mktemp("documents")
    for number, name in enumerate(training.LANGUAGES, 1):
        training.write_tokens(folder / name, language=number, tokens=40_000)
        training.write_tokens(folder / f"{name}-validation", language=number, tokens=3_000, seed=1)
    return folder


def inputs(heads=4, kv_heads=2, width=64, dtype=torch.float32):
    """Queries, keys and values of normal numbers, on the CPU, rounded to a dtype."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(2, n, STARTS_BL.shape[1], width) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def with_gradients(qkv, *, kernel=None, window=None, count=None):
    """Output and gradients in float32 on the CPU; by a GPU's kernel, or on the CPU without one."""
    leaves = [x.detach().to("cpu" if kernel is None else "cuda").requires_grad_() for x in qkv]
    if kernel is None:
        out = document_attention(*leaves, documents=Documents(STARTS_BL), window=window)
    else:
        starts_BL = STARTS_BL.cuda()
        mask = kernel_mask(kernel, window, starts_BL, document_bounds(STARTS_BL))
        mask = mask if count is None else varlen_mask(starts_BL, count=count, longest=400, window=window)
        out = mask.attend(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    return [x.detach().cpu().float() for x in (out, *torch.autograd.grad(out, leaves, weights))]


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (8, 2, 128), (4, 1, 80)])
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS, ids=str)
def test_attention_and_gradients_are_those_of_the_cpus_path(kernel, dtype, heads, kv_heads, width, window):
    qkv = inputs(heads, kv_heads, width, dtype)
    error = 0.02 if dtype == torch.bfloat16 else 3e-3  # torch may multiply float32 as TF32

    found = with_gradients(qkv, kernel=kernel, window=window)
    right = with_gradients([x.float() for x in qkv], window=window)

    for one, other in zip(found, right, strict=True):
        assert (one - other).norm() <= error * other.norm()


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS, ids=str)
def test_a_changed_document_changes_no_bit_of_the_others(kernel, dtype):
    """With the backward pass in a fixed order; flash otherwise adds in the order in which blocks end."""
    before, after = inputs(dtype=dtype), inputs(dtype=dtype)
    for x in after:
        x[0, :, 1:131] += 1  # the second document

    torch.use_deterministic_algorithms(True)
    try:
        found = [with_gradients(qkv, kernel=kernel) for qkv in (before, after)]
    finally:
        torch.use_deterministic_algorithms(False)

    for one, other in zip(*found, strict=True):
        assert torch.equal(one[0, :, :1], other[0, :, :1])
        assert torch.equal(one[0, :, 131:], other[0, :, 131:])
        assert torch.equal(one[1], other[1])
        assert not torch.equal(one[0, :, 1:131], other[0, :, 1:131])


def test_empty_documents_after_the_last_one_change_nothing():
    """The bounds are rounded up: flash gets up to twice as many sequences as there are documents."""
    qkv = inputs(dtype=torch.bfloat16)
    exact, padded = (with_gradients(qkv, kernel="flash", count=count) for count in (6, 512))

    for one, other in zip(exact, padded, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()
        assert one.isfinite().all()


@pytest.mark.parametrize("kernel", ["flash", "flex"])
def test_masks_and_attention_do_not_wait_for_the_gpu(kernel):
    """torch raises an error at every operation that waits."""
    bounds, starts_BL = document_bounds(STARTS_BL), STARTS_BL.cuda()
    leaves = [x.bfloat16().cuda().requires_grad_() for x in inputs()]

    def step():
        kernel_mask(kernel, None, starts_BL, bounds).attend(*leaves).sum().backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("window", [None, 100])
def test_flex_in_a_cuda_graph_follows_the_documents(window):
    """A replay makes the mask of the documents that the tensor then has."""
    starts_BL, other_BL = STARTS_BL.cuda(), STARTS_BL.flip(0).cuda()
    leaves = [x.bfloat16().cuda() for x in inputs()]

    def attend():
        with torch.no_grad():
            return flex_mask(starts_BL, window=window).attend(*leaves)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attend()
        attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    starts_BL.copy_(other_BL)
    graph.replay()
    replayed = out.clone()

    assert torch.equal(replayed, attend())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("backend", ["flash", "flex", "efficient"])
def test_a_model_has_the_logits_of_the_cpus_path(backend, family, compiled):
    """In bfloat16 on both sides; positions restart at each document."""
    model = build_model(named_size(family, "debug", 257, {}))
    model.init_weights(seed=3)
    model = model.bfloat16()
    tokens_BL = torch.arange(STARTS_BL.numel()).view(STARTS_BL.shape) % 257
    positions_BL = torch.arange(STARTS_BL.shape[1], dtype=torch.int32) - STARTS_BL
    right = model(tokens_BL, starts_BL=STARTS_BL, positions_BL=positions_BL).float()
    model = model.cuda()
    set_document_backend([model], backend)
    if compiled:
        model.trunk = torch.compile(model.trunk, fullgraph=True)
    found = model(
        tokens_BL.cuda(),
        starts_BL=STARTS_BL.cuda(),
        positions_BL=positions_BL.cuda(),
        bounds=document_bounds(STARTS_BL),
    )

    assert (found.cpu().float() - right).norm() <= 0.03 * right.norm()


RUNS = {
    "default": {},
    "flash": {"training": {"attention_backend": "flash"}},
    "flex": {"training": {"attention_backend": "flex"}},
    "fastest": {"training": {"attention_backend": "fastest"}},
    "compiled": COMPILED,
    "flex, compiled": {**COMPILED, "training": {"attention_backend": "flex"}},
    "the whole model compiled": {"compile": {"enable": True, "scope": "model"}},
    "CUDA graphs": {"training": {"cuda_graphs": True}},
    "CUDA graphs, compiled": {**COMPILED, "training": {"cuda_graphs": True}},
    "selective checkpointing": {"activation_checkpoint": {"mode": "selective"}},
    "selective checkpointing of flex, compiled": {
        **COMPILED,
        "activation_checkpoint": {"mode": "selective"},
        "training": {"attention_backend": "flex"},
    },
    "full checkpointing": {"activation_checkpoint": {"mode": "full"}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_masked_run_has_the_losses_of_a_boolean_mask(run, name):  # noqa: F811
    """torch's attention with the mask as a matrix, in bfloat16."""
    with_mask = run("kernel", BF16, MASKED, RUNS[name])
    matrix = run("matrix", BF16, MASKED, {"training": {"attention_backend": "math"}})

    assert largest_difference(with_mask, matrix) < 0.02


@pytest.mark.parametrize("name", ["default", "flex", "CUDA graphs, compiled"])
def test_a_killed_masked_run_resumes_to_the_same_bits(run, name):  # noqa: F811
    """kill -9 in the second stage."""
    tables = (BF16, DETERMINISTIC, MASKED, RUNS[name])
    unbroken = run("unbroken", *tables)
    killed = run("killed", *tables, fault=training.Fault("titan_cpt.train:Trainer.train_step", 17))
    run("killed", *tables)

    assert training.numbers_of(killed) == training.numbers_of(unbroken)


def test_a_masked_float32_run_has_the_losses_of_a_cpu(run, data, tmp_path):  # noqa: F811
    """The CPU computes document by document, the GPU with FlexAttention."""
    on_gpu = run("gpu", MASKED)
    file = config(data, tmp_path / "cpu", MASKED)
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "titan_cpt", "train", "--config", file], env=hidden, check=True)

    assert largest_difference(on_gpu, tmp_path / "cpu" / "run") < 1e-3
