"""What one step asks of the machine, counted: a regression of speed is seen here without a clock.

Operators, allocations, collectives and host syncs of the second step of three configurations, as golden numbers. A
change that moves one is welcome with its reason: write the new number down. They hold for the version of torch that
they were taken with, and those of allocations for the CPU's way with bfloat16: where it has instructions for it, oneDNN
multiplies and takes buffers of its own.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from titan_cpt.data.batch import Batch
from titan_cpt.distributed.build import build_parallel_model
from titan_cpt.distributed.device_mesh import build_mesh
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.models.common import ops
from titan_cpt.models.registry import named_size
from titan_cpt.planning.model_spec import padded_vocab
from titan_cpt.train import Trainer
from titan_cpt.training.forward_backward import EagerStep, make_runner
from titan_cpt.training.optimization.adamw import build_adamw
from titan_cpt.training.optimization.update import UpdateGuard

pytestmark = [
    pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the numbers were taken with torch 2.13"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
]
HOST_SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
WAITING = {"wait_tensor", "_wrap_tensor_autograd"}
BFLOAT16_BY_ONEDNN = ops.CPU_HAS_BFLOAT16
NO_WORK = {
    "aten::view",
    "aten::_unsafe_view",
    "aten::t",
    "aten::transpose",
    "aten::slice",
    "aten::detach",
    "aten::alias",
}


@pytest.fixture(autouse=True)
def with_bfloat16(monkeypatch):
    """Torch's own products on any CPU: what takes their place without bfloat16 casts its operands besides."""
    monkeypatch.setattr(ops, "CPU_HAS_BFLOAT16", True)


class Counting(TorchDispatchMode):
    """Counts what reaches the kernels of this rank."""

    def __init__(self):
        super().__init__()
        self.operators, self.collectives, self.host_syncs = 0, Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count an operator and let it run."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with what this rank holds
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")):
            kind = name.split("::")[1]
            self.collectives.update([kind] if kind not in WAITING else [])
        elif name in HOST_SYNCS:
            self.host_syncs += 1
        elif name not in NO_WORK:
            self.operators += 1
        return func(*args, **(kwargs or {}))


def one_step(family, precision, layout, *, accumulation=1):
    """The counts of a step of the debug model on rank 0."""
    if layout.world_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    try:
        spec = padded_vocab(named_size(family, "debug", 257), layout.tp)
        ranks = ProcessInfo(0, layout.world_size, torch.device("cpu"))
        mesh = build_mesh(ranks, layout)
        options = ParallelOptions(precision=precision)
        model, stages, compute_copy = build_parallel_model(spec, mesh, options)
        engine = make_runner(stages, compute_copy, mesh, options)
        model.init_weights(0)
        optimizer = build_adamw(model, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        tokens = torch.arange(34).view(2, 17)
        stepper = EagerStep(
            model=model,
            runner=engine,
            optimizer=optimizer,
            guard=UpdateGuard(optimizer),
            mesh=mesh,
            max_norm=1.0,
        )
        trainer = SimpleNamespace(
            plan=SimpleNamespace(accumulation=lambda stage, step: accumulation),
            readers={"stage": SimpleNamespace(packs=False)},
            optimizer=optimizer,
            stepper=stepper,
        )
        loader = SimpleNamespace(batch=lambda step, micro: Batch(tokens[:, :-1], tokens[:, 1:]))
        stage = SimpleNamespace(name="stage", lr_at=lambda step: 1e-3, step_tokens=lambda step: 32 * accumulation)
        Trainer.train_step(trainer, loader, stage, 0)
        with Counting() as counted:
            Trainer.train_step(trainer, loader, stage, 1)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            Trainer.train_step(trainer, loader, stage, 2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    events = profiled.profiler.kineto_results.events()
    allocations = sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)
    return {
        "operators": counted.operators,
        "allocations": allocations,
        "host_syncs": counted.host_syncs,
        "collectives": dict(sorted(counted.collectives.items())),
    }


def test_golden_counts_of_a_single_process_in_fp32():
    """No cast, no collective, no host sync."""
    assert one_step("gpt_neox", torch.float32, ParallelDims()) == {
        "operators": 244,
        "allocations": 345,
        "host_syncs": 0,
        "collectives": {},
    }


def test_golden_counts_of_two_micro_batches_in_bf16():
    """The weights are cast once, not twice; no host sync."""
    assert one_step("gpt_neox", torch.bfloat16, ParallelDims(), accumulation=2) == {
        "operators": 630,
        "allocations": 776 if BFLOAT16_BY_ONEDNN else 722,
        "host_syncs": 0,
        "collectives": {},
    }


def test_golden_counts_of_fsdp_over_tensor_parallelism():
    """Two shards by two slices: what is gathered, summed and scattered in a step."""
    assert one_step("gpt_neox", torch.bfloat16, ParallelDims(dp_shard=2, tp=2)) == {
        "operators": 579,
        "allocations": 685 if BFLOAT16_BY_ONEDNN else 658,
        "host_syncs": 0,
        "collectives": {
            "_allgather_base_": 7,
            "_reduce_scatter_base_": 4,
            "all_gather_into_tensor": 10,
            "all_reduce": 15,
            "allreduce_": 2,
            "reduce_scatter_tensor": 10,
        },
    }
