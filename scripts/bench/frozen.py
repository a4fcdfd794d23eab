"""Measure what frozen weights save: whole steps that train everything, or only some weights, in turns.

    python scripts/bench/frozen.py [--turns 15] [--shape B]

In one process, one thread on a CPU: forward and backward of 8 sequences, clipping, the guard and the update, by the
trainer in bfloat16. Memory is counted in a step of its own: gradients and moments, and what autograd saves for the
backward pass, without weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from shape_b import HEAD, SHAPES, STAGE
from trainer import WARM_UP_STEPS, InMemory

TRAINED = {
    "everything": None,
    "embedding and head": ["embedding", "head"],
    "the upper half": ["blocks.4-7", "final_norm", "head"],
    "head": ["head"],
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--shape", choices=SHAPES, default="B")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.turns, SHAPES[options.shape])
    print(
        "| trained | step, s | relative to everything, median over the turns | FLOPs a token, planned, relative | "
        "gradients and moments, MiB | saved for the backward pass, MiB |\n|---|---|---|---|---|---|"
    )
    base, base_flops, *_ = found["everything"]
    for name, (times, flops, state, saved) in found.items():
        ratio = statistics.median(own / whole for own, whole in zip(times, base, strict=True))
        print(
            f"| {name} | {statistics.median(times):.3f} | {ratio:.2f} | {flops / base_flops:.2f} | {state / 2**20:.0f} "
            f"| {saved / 2**20:.0f} |"
        )


def measure(folder: Path, turns: int, shape: dict[str, int]) -> dict[str, tuple[list[float], float, int, int]]:
    """By what is trained: seconds of each step, planned FLOPs a token, bytes of state and of saved activations."""
    import device

    from titan_cpt.common.process_settings import keep_freed_memory
    from titan_cpt.common.signals import StopRequest
    from titan_cpt.config.load import load_config
    from titan_cpt.data.formats.indexed_writer import IndexedWriter
    from titan_cpt.distributed.process_group import init_process_group
    from titan_cpt.train import Trainer
    from titan_cpt.training.build import build
    from titan_cpt.training.stage_start import begin_stage

    device.one_thread_on_a_cpu()
    print(device.where(), flush=True)
    keep_freed_memory()
    steps = WARM_UP_STEPS + turns + 1
    with IndexedWriter(folder / "noise", 257) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 257, size=8 * shape["seq_len"] * steps + 1))
    text = HEAD.format(folder=folder, interval=steps + 1, **shape) + STAGE.format(number=1, steps=steps)
    (folder / "frozen.toml").write_text(text)
    runs: dict[str, tuple[Any, InMemory]] = {}
    with ExitStack() as stack:
        for name, trainable in TRAINED.items():
            key = [] if trainable is None else [("stages.stage-1.trainable", json.dumps(trainable))]
            run = name.replace(" ", "-")
            config = load_config(folder / "frozen.toml", [("job.name", run), *key])
            (folder / run).mkdir()
            stop = stack.enter_context(StopRequest())
            trainer, _ = build(Trainer, config, init_process_group(), folder / run, stop)
            begin_stage(trainer, trainer.plan.stages[0])
            runs[name] = trainer, InMemory(trainer.open_loader(trainer.plan.stages[0], 0), steps)
            stack.callback(trainer.log.close)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for step in range(steps - 1):
            for name, (trainer, batches) in runs.items():
                began = time.perf_counter()
                trainer.train_step(batches, trainer.plan.stages[0], step)
                device.wait()
                times[name] += [time.perf_counter() - began] if step >= WARM_UP_STEPS else []
        return {
            name: (times[name], trainer.plan.stages[0].flops_per_token, *_bytes(trainer, batches, steps - 1))
            for name, (trainer, batches) in runs.items()
        }


def _bytes(trainer: Any, batches: InMemory, step: int) -> tuple[int, int]:
    """Bytes of gradients and moments, and of what autograd saves that is not a weight, in one forward and backward."""
    import torch

    weights = {weight.untyped_storage().data_ptr() for model in trainer.runner.models for weight in model.parameters()}
    saved: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        trainer.stepper.backward(
            batches.batch(step, 0), step_tokens=trainer.plan.stages[0].step_tokens(step), first=True
        )
    gradients = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    trainer.model.zero_grad(set_to_none=True)
    return sum(each.nbytes for each in (*gradients, *moments)), sum(saved.values())


if __name__ == "__main__":
    sys.exit(main())
