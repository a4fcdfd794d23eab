"""Measure what Muon costs: whole steps with Muon and with AdamW, in turns, and the share of the update.

    python scripts/bench/muon.py [--turns 15] [--shape B]

In one process, one thread on a CPU: forward and backward of 8 sequences, clipping, the guard and the update, by the
trainer. Beside the clock it counts processor time, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--shape", choices=SHAPES, default="B")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = measure(Path(folder), options.turns, SHAPES[options.shape])
    print("| | step, s | processor time of a step, s | of its update, s |\n|---|---|---|---|")
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    for name, (clock, processor, update) in medians.items():
        print(f"| {name} | {clock:.3f} | {processor:.3f} | {update:.3f} |")
    ratios = [
        statistics.median(m[i] / a[i] for m, a in zip(times["Muon"], times["AdamW"], strict=True)) for i in (0, 1)
    ]
    print(f"| Muon / AdamW, median over the turns | {ratios[0]:.3f} | {ratios[1]:.3f} | |")


def measure(folder: Path, turns: int, shape: dict[str, int]) -> dict[str, list[tuple[float, float, float]]]:
    """By optimizer and turn: seconds of a step, its processor seconds, and those of the update."""
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
    steps = WARM_UP_STEPS + turns
    with IndexedWriter(folder / "noise", 257) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 257, size=8 * shape["seq_len"] * steps + 1))
    text = HEAD.format(folder=folder, interval=steps + 1, **shape) + STAGE.format(number=1, steps=steps)
    (folder / "muon.toml").write_text(text)
    trainers: dict[str, tuple[Any, InMemory]] = {}
    with ExitStack() as stack:
        for name in ("AdamW", "Muon"):
            config = load_config(folder / "muon.toml", [("job.name", name), ("optimizer.name", name)])
            (folder / name).mkdir()
            stop = stack.enter_context(StopRequest())
            trainer, _ = build(Trainer, config, init_process_group(), folder / name, stop)
            begin_stage(trainer, trainer.plan.stages[0])
            trainers[name] = trainer, InMemory(trainer.open_loader(trainer.plan.stages[0], 0), steps)
            stack.callback(trainer.log.close)
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in trainers}
        for step in range(steps):
            for name, (trainer, batches) in trainers.items():
                found = _timed_step(trainer, batches, step, device.wait)
                times[name] += [found] if step >= WARM_UP_STEPS else []
    return times


def _timed_step(trainer: Any, batches: InMemory, step: int, wait: Any) -> tuple[float, float, float]:
    """Seconds of a step, its processor seconds, and those of the optimizer's share."""
    stage, optimizer, update_s = trainer.plan.stages[0], trainer.optimizer, 0.0
    update = type(optimizer).step

    def timed() -> None:
        nonlocal update_s
        wait()
        begin = time.process_time()
        update(optimizer)
        wait()
        update_s = time.process_time() - begin

    optimizer.step = timed
    begin, began = time.perf_counter(), time.process_time()
    trainer.train_step(batches, stage, step)
    wait()
    return time.perf_counter() - begin, time.process_time() - began, update_s


if __name__ == "__main__":
    sys.exit(main())
