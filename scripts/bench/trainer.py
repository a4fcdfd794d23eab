"""Measure the overhead of the trainer: loader, metrics, TensorBoard, asynchronous checkpoints; without validation.

    python scripts/bench/trainer.py [--stages 4] [--steps 30]

In one process, in turns: a stage as `titan-cpt train` trains it, saved halfway and at its end, and as many bare steps
on batches in memory. On a CPU the steps use one thread; the checkpoint writers use the machine's other cores. On a GPU
the clock waits for the device, and --shape G405 takes the paper's 405M with 8 x 2,048 tokens. The default is shape B of
speed/race.py in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from shape_b import HEAD, SHAPES, STAGE

WARM_UP_STEPS = 3


class InMemory:
    """The batches of a stage, read in advance."""

    def __init__(self, loader: Any, steps: int) -> None:
        self.batches = [loader.batch(step, 0) for step in range(steps)]

    def batch(self, step: int, micro: int) -> Any:
        """Like StageLoader.batch, for one micro-batch a step."""
        assert micro == 0, "one micro-batch a step"
        return self.batches[step]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--shape", choices=SHAPES, default="B")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        pairs = measure(Path(name), options.stages, options.steps, SHAPES[options.shape])
    print("| turn | whole trainer, s a step | bare step, s | bare / whole |\n|---|---|---|---|")
    for turn, (whole, bare) in enumerate(pairs, start=1):
        print(f"| {turn} | {whole:.3f} | {bare:.3f} | {bare / whole:.1%} |")
    whole, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"| median | {whole:.3f} | {bare:.3f} | {statistics.median(b / w for w, b in pairs):.1%} |")


def measure(folder: Path, stages: int, steps: int, shape: dict[str, int]) -> list[tuple[float, float]]:
    """Seconds per step of every stage: with the whole trainer, and bare."""
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
    with IndexedWriter(folder / "noise", 257) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 257, size=8 * shape["seq_len"] * stages * steps + 1))
    text = HEAD.format(folder=folder, interval=-(-steps // 2), **shape)
    text += "".join(STAGE.format(number=number, steps=steps) for number in range(stages))
    (folder / "trainer.toml").write_text(text)
    config = load_config(folder / "trainer.toml")
    run, pairs = folder / config.job.name, []
    run.mkdir()
    with StopRequest() as stop:
        trainer, _ = build(Trainer, config, init_process_group(), run, stop)
        for stage in trainer.plan.stages:
            begin_stage(trainer, stage)
            in_memory = InMemory(trainer.open_loader(stage, 0), steps)
            for step in range(WARM_UP_STEPS):
                trainer.train_step(in_memory, stage, step)  # type: ignore[arg-type]  # the only method of a loader that it calls
            device.wait()
            begin = time.perf_counter()
            trainer.train_stage(stage, 0)
            device.wait()
            whole = time.perf_counter() - begin
            trainer.checkpoints.wait()
            begin = time.perf_counter()
            for step in range(steps):
                trainer.train_step(in_memory, stage, step)  # type: ignore[arg-type]
            device.wait()
            pairs.append((whole / steps, (time.perf_counter() - begin) / steps))
        trainer.log.close()
    return pairs


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
