"""Run on two ranks: gradients of one document under every kind of parallelism, given other tokens around it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_cpt.data.batch import Batch
from titan_cpt.data.documents import DocumentSettings
from titan_cpt.distributed.build import build_parallel_model
from titan_cpt.distributed.device_mesh import build_mesh
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.distributed.process_group import ProcessInfo, destroy_process_group, init_process_group
from titan_cpt.models.registry import named_size
from titan_cpt.training.forward_backward import (
    PipelineRunner,
    SingleStageRunner,
    local_documents,
    local_inputs,
    local_tokens,
    make_runner,
)

END = 256
FIRST, LAST = 21, 66  # of 96 positions: the document that is looked at; under CP on both ranks, in three chunks
DIMS = {
    "fsdp": ParallelDims(dp_shard=2),
    "tp": ParallelDims(tp=2, loss_parallel=False),
    "cp": ParallelDims(cp=2),
    "pp": ParallelDims(pp=2, microbatches=2, microbatch_size=1),
}
MODELS = {
    "windowed": ("llama", {"heads": 4, "kv_heads": 2, "sliding_window": 30}),
    "gpt_neox": ("gpt_neox", {}),
}


def independent(arguments: Sequence[str]) -> None:
    """Write for every layout and model whether the gradients are equal bit for bit: with a mask, and without."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    process = init_process_group()
    equal = {}
    for layout, dims in DIMS.items():
        for name in MODELS:
            for precision in (torch.float32, torch.bfloat16):
                for masked in (True, False):
                    key = f"{layout} {name} {str(precision)[6:]} {masked}"
                    equal[key] = _equal(process, dims, name, precision, masked=masked)
    (Path(arguments[0]) / f"equal-{process.rank}.json").write_text(json.dumps(equal))
    destroy_process_group()


def _equal(process: ProcessInfo, dims: ParallelDims, name: str, precision: torch.dtype, *, masked: bool) -> bool:
    mesh = build_mesh(process, dims)
    family, overrides = MODELS[name]
    options = ParallelOptions(precision=precision)
    model, stages, compute_copy = build_parallel_model(named_size(family, "debug", 257, overrides), mesh, options)
    model.init_weights(0)
    runner = make_runner(stages, compute_copy, mesh, options)
    found = []
    for shift in (0, 1):
        model.zero_grad()
        _backward(runner, _batch(mesh.data_rank, shift, masked=masked))
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert gradients
        found.append([each.to_local() if isinstance(each, DTensor) else each for each in gradients])
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def _batch(rank: int, shift: int, *, masked: bool) -> Batch:
    """Two sequences. All tokens but those of the document depend on `shift`; its targets are 1, the others 0."""
    tokens = torch.randint(0, END, (2, 96), generator=torch.Generator().manual_seed(rank))
    inside = torch.zeros(2, 96, dtype=torch.int64)
    inside[:, FIRST:LAST] = 1
    tokens = torch.where(inside == 1, tokens, (tokens + shift) % END)
    tokens[:, [19, FIRST - 1, LAST - 1]] = END  # the document before is empty
    batch = Batch(tokens, inside)
    return DocumentSettings(END, mask=True, positions=True).added_to(batch) if masked else batch


def _backward(runner: SingleStageRunner | PipelineRunner, batch: Batch) -> None:
    if isinstance(runner, PipelineRunner):
        runner._loss = _loss  # type: ignore[method-assign]
        runner.backward(batch, 1)
        return
    logits_BLV = runner.model(local_inputs(batch.inputs_BL, runner.mesh), **local_documents(batch, runner.mesh))
    _loss(logits_BLV, local_tokens(batch.targets_BL, runner.mesh)).backward()  # type: ignore[no-untyped-call]


def _loss(logits_BLV: Tensor, inside_BL: Tensor) -> Tensor:
    """A loss of the document's logits only."""
    return (logits_BLV.float().square().mean(-1) * inside_BL).sum()
