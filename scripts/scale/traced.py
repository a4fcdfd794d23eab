"""Compare the bytes that a traced step sends, by collective, with the plan's estimate.

    python scripts/scale/traced.py

Step and tensors are real (forward, loss, backward); the process group is torch's fake one, whose collectives send
nothing, so one core can trace any number of ranks. An all-gather over n ranks counts as its output x (n - 1) / n,
a reduce-scatter as its input x (n - 1) / n, an all-reduce as twice that.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from titan_cpt.data.batch import Batch
from titan_cpt.distributed.build import build_parallel_model
from titan_cpt.distributed.device_mesh import build_mesh
from titan_cpt.distributed.options import ParallelOptions
from titan_cpt.distributed.parallel_dims import ParallelDims
from titan_cpt.distributed.process_group import ProcessInfo
from titan_cpt.models.registry import named_size
from titan_cpt.planning.memory import footprint
from titan_cpt.planning.model_spec import padded_vocab
from titan_cpt.planning.parallel import MemoryInputs
from titan_cpt.training.forward_backward import make_runner

SEQ_LEN, SEQUENCES, ACCUMULATION = 256, 2, 2
LAYOUTS = (
    ParallelDims(dp_shard=8),
    ParallelDims(dp_shard=64, reshard_after_forward=False),
    ParallelDims(dp_replicate=2, dp_shard=8),
    ParallelDims(tp=4),
    ParallelDims(dp_shard=16, tp=4),
    ParallelDims(dp_shard=4, cp=2),
)
TOLERANCE = 0.01


class Sent(TorchDispatchMode):
    """Sums the bytes of every collective of this rank, by kind of parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; count its bytes if it is a collective."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name == "_allgather_base_":
            self._add("fsdp gather", args[0].nbytes - args[1].nbytes)
        elif name == "_reduce_scatter_base_":
            self._add("fsdp scatter", args[1].nbytes - args[0].nbytes)
        elif name == "all_gather_into_tensor":
            self._add("tensor", out.nbytes - args[0].nbytes)
        elif name == "reduce_scatter_tensor":
            self._add("tensor", args[0].nbytes - out.nbytes)
        elif name == "all_reduce":
            ranks = dist.distributed_c10d._resolve_process_group(args[2]).size()
            self._add("tensor, small sums", 2 * args[0].nbytes * (ranks - 1) // ranks)
        elif name == "allgather_":
            self._add("context", sum(part.nbytes for part in args[0][0]) - args[1][0].nbytes)
        elif name == "reduce_scatter_":
            self._add("context", sum(part.nbytes for part in args[1][0]) - args[0][0].nbytes)
        elif name == "allreduce_":
            tensors: list[Tensor] = args[0]
            ranks = dist.distributed_c10d.ProcessGroup.unbox(args[1]).size()
            self._add("replicas' sum", sum(2 * tensor.nbytes * (ranks - 1) // ranks for tensor in tensors))
        return out

    def _add(self, kind: str, count: int) -> None:
        self.bytes[kind] += count
        self.calls[kind] += 1


def traced(family: str, layout: ParallelDims) -> tuple[Sent, Any]:
    """Trace one step: the bytes counted, and the plan's estimate."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    try:
        spec = padded_vocab(named_size(family, "mini", 8000), layout.tp)
        ranks = ProcessInfo(0, layout.world_size, torch.device("cpu"))
        mesh = build_mesh(ranks, layout)
        options = ParallelOptions(precision=torch.bfloat16)
        model, stages, compute_copy = build_parallel_model(spec, mesh, options)
        engine = make_runner(stages, compute_copy, mesh, options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
        tokens = torch.zeros(SEQUENCES, SEQ_LEN + 1, dtype=torch.int64)
        with Sent() as sent:
            for _ in range(ACCUMULATION):
                engine.backward(Batch(tokens[:, :-1], tokens[:, 1:]), SEQUENCES * SEQ_LEN * ACCUMULATION)
    finally:
        dist.destroy_process_group()
    work = MemoryInputs(
        microbatch_tokens=SEQUENCES * SEQ_LEN // layout.cp,
        accumulation=ACCUMULATION,
        bytes_per_number=2,
        recompute="none",
        selection="op",
        memory_budget=0.5,
    )
    return sent, footprint(spec, layout, work)


def main() -> int:
    """Print a table for each layout; returns 1 if an estimate differs by more than the tolerance."""
    worst = 0.0
    for family in ("gpt_neox", "llama"):
        for layout in LAYOUTS:
            sent, planned = traced(family, layout)
            counted = {
                "fsdp": sent.bytes["fsdp gather"] + sent.bytes["fsdp scatter"] + sent.bytes["replicas' sum"],
                "tensor": sent.bytes["tensor"] + sent.bytes["tensor, small sums"],
                "context": sent.bytes["context"],
            }
            estimated = {name: getattr(planned.traffic, name) for name in counted}
            degrees = {name: getattr(layout, name) for name in ("dp_replicate", "dp_shard", "tp", "cp")}
            print(f"{family}", " ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1))
            for kind, count in counted.items():
                if count or estimated[kind]:
                    off = estimated[kind] / count - 1 if count else float("inf")
                    worst = max(worst, abs(off))
                    print(f"  {kind:<8} counted {count:>13,} bytes, estimated {estimated[kind]:>13,}: {off:+.2%}")
            print("  calls   ", ", ".join(f"{kind} {calls}" for kind, calls in sorted(sent.calls.items())))
    print(f"the largest difference is {worst:.2%}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
