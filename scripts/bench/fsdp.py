"""Compare FSDP2 on two processes with one process: the same work for each process, one thread each.

    python scripts/bench/fsdp.py [--turns 3]

Runs of one and of two processes take turns; each process trains on batches of 8 x 512 tokens, shape B of
speed/race.py in bfloat16, over gloo on the CPU. On a machine with two GPUs each process has its own, over NCCL. Ideal
is twice the tokens per second of one process. Medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from shape_b import HEAD, SHAPES, STAGE

WARM_UP_STEPS, STEPS, PROCESSES = 2, 8, 2


def gpus() -> int:
    """How many GPUs torch finds; it is imported by another process, so that none of them stays in use here."""
    count = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker)
    speeds: dict[int, list[float]] = {1: [], PROCESSES: []}
    for _ in range(options.turns):
        for processes, found in speeds.items():
            found.append(tokens_per_second(processes))
    one, two = (statistics.median(found) for found in speeds.values())
    print("| processes | tokens/s | of ideal |\n|---|---|---|")
    print(f"| 1 | {one:.0f} | |\n| 2 | {two:.0f} | {two / (2 * one):.1%} |")
    return None


def tokens_per_second(processes: int) -> float:
    """Tokens per second of one launch."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory() as name:
        words = [sys.executable, *torchrun, str(Path(__file__).resolve()), "--worker", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if gpus() < PROCESSES:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return float(json.loads((Path(name) / "speed.json").read_text()))


def work(folder: Path) -> None:
    """Train as one rank; rank 0 writes the speed into the folder."""
    import device

    from titan_cpt.common.process_settings import keep_freed_memory
    from titan_cpt.common.signals import StopRequest
    from titan_cpt.config.load import load_config
    from titan_cpt.data.formats.indexed_writer import IndexedWriter
    from titan_cpt.distributed.process_group import barrier, destroy_process_group, init_process_group
    from titan_cpt.train import Trainer
    from titan_cpt.training.build import build
    from titan_cpt.training.stage_start import begin_stage

    device.one_thread_on_a_cpu()
    keep_freed_memory()
    ranks, steps = init_process_group(), WARM_UP_STEPS + STEPS
    if ranks.rank == 0:
        with IndexedWriter(folder / "noise", 257) as writer:
            writer.add_document(np.random.default_rng(0).integers(0, 257, size=16 * 512 * steps + 1))
        (folder / "fsdp.toml").write_text(
            HEAD.format(folder=folder, interval=1000, **SHAPES["B"]) + STAGE.format(number=0, steps=steps)
        )
    barrier()
    config = load_config(folder / "fsdp.toml", [("training.global_batch_size", str(8 * ranks.world_size))])
    (folder / config.job.name).mkdir(exist_ok=True)
    with StopRequest() as stop:
        trainer, _ = build(Trainer, config, ranks, folder / config.job.name, stop)
        stage = trainer.plan.stages[0]
        begin_stage(trainer, stage)
        loader = trainer.open_loader(stage, 0)
        for step in range(WARM_UP_STEPS):
            trainer.train_step(loader, stage, step)
        device.wait()
        barrier()
        begin = time.perf_counter()
        for step in range(WARM_UP_STEPS, steps):
            trainer.train_step(loader, stage, step)
        device.wait()
        barrier()
        seconds = time.perf_counter() - begin
        trainer.log.close()
    if ranks.rank == 0:
        (folder / "speed.json").write_text(json.dumps(STEPS * trainer.plan.step_tokens / seconds))
    destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
