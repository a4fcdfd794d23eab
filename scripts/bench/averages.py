"""Measure what an average of the weights adds to a training step, without validation and checkpoints.

    python scripts/bench/averages.py [--turns 4] [--steps 20] [--every 10] [--keep-on host]

Stages with an average and without one take turns in one process, on the same batches. A step's time includes the
snapshots of the stage and the waiting for the device before each. A real stage has fewer: with the defaults of
`[averaging]`, 50 in all of its steps. On a CPU the steps use one thread, and seconds are its CPU time, which other work
on the machine changes less than the time of day. --shape G405 takes the paper's 405M with 8 x 2,048 tokens; the default
is shape B of speed/race.py in bfloat16.
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
import torch
from shape_b import HEAD, SHAPES, STAGE

clock = time.perf_counter if torch.cuda.is_available() else time.thread_time


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--keep-on", choices=("host", "device"), default="host")
    parser.add_argument("--shape", choices=SHAPES, default="B")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        pairs, actions = measure(Path(name), options)
    print("| turn | without an average, s a step | with one | ratio |\n|---|---|---|---|")
    for turn, (without, averaged) in enumerate(pairs, start=1):
        print(f"| {turn} | {without:.4f} | {averaged:.4f} | {averaged / without:.4f} |")
    without, averaged = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"| median | {without:.4f} | {averaged:.4f} | {statistics.median(b / a for a, b in pairs):.4f} |")
    for action, seconds in actions.items():
        share = statistics.median(seconds) / without
        print(f"{action}: median {statistics.median(seconds):.4f} s, {share:.1%} of a step")
    share = statistics.median(actions["snapshot"]) / options.every / without
    print(f"a snapshot every {options.every} steps: {share:.2%} of the steps' time")


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[tuple[float, float]], dict[str, list[float]]]:
    """Seconds per step of each turn, without an average and with one; seconds of each snapshot and average."""
    import device

    from titan_cpt.common.process_settings import keep_freed_memory
    from titan_cpt.common.signals import StopRequest
    from titan_cpt.config.load import load_config
    from titan_cpt.data.formats.indexed_writer import IndexedWriter
    from titan_cpt.distributed.process_group import init_process_group
    from titan_cpt.train import Trainer
    from titan_cpt.training.build import build

    device.one_thread_on_a_cpu()
    print(device.where(), flush=True)
    keep_freed_memory()
    shape, steps = SHAPES[options.shape], options.steps + 1
    with IndexedWriter(folder / "noise", 257) as writer:
        tokens = 8 * shape["seq_len"] * 2 * options.turns * steps + 1
        writer.add_document(np.random.default_rng(0).integers(0, 257, size=tokens))
    text = HEAD.format(folder=folder, interval=10 * steps, **shape)
    text += (
        f'[averaging]\nkind = "like_decay"\nlast = {steps}\nevery = {options.every}\nkeep_on = "{options.keep_on}"\n'
    )
    for number in range(2 * options.turns):
        text += STAGE.format(number=number, steps=steps) + ("" if number % 2 else 'averaging = "off"\n')
    (folder / "averages.toml").write_text(text)
    config = load_config(folder / "averages.toml")
    run = folder / config.job.name
    run.mkdir()
    seconds, actions = [], dict[str, list[float]](snapshot=[], average=[], exchange=[])
    with StopRequest() as stop:
        trainer, _ = build(Trainer, config, init_process_group(), run, stop)
        for stage in trainer.plan.stages:
            seconds.append(_seconds_a_step(trainer, stage, device))
            if stage.averaging is not None:
                _time_actions(trainer, stage, actions, device)
        trainer.log.close()
    return list(zip(seconds[::2], seconds[1::2], strict=True)), actions


def _seconds_a_step(trainer: Any, stage: Any, device: Any) -> float:
    """The mean over the steps after the first one; what follows the last one, its checkpoint, is excluded."""
    from titan_cpt.training.stage_start import begin_stage

    begin_stage(trainer, stage)
    begin = end = 0.0
    for _, done, _ in trainer.stage_steps(stage, 0, validate_first=False):
        if done in (1, stage.steps):
            device.wait()
            begin, end = (clock(), end) if done == 1 else (begin, clock())
    trainer.checkpoints.wait()
    return (end - begin) / (stage.steps - 1)


def _time_actions(trainer: Any, stage: Any, actions: dict[str, list[float]], device: Any) -> None:
    """A snapshot, computing the average, and exchanging the weights for it and back."""
    copies = trainer.copies
    device.wait()
    begin = clock()
    copies.take(stage, stage.averaging.phase or stage.averaging.every)
    device.wait()
    taken = clock()
    with copies.averaged():
        device.wait()
    first = clock()
    with copies.averaged():
        device.wait()
    again = clock() - first
    actions["snapshot"].append(taken - begin)
    actions["exchange"].append(again)
    actions["average"].append(max(0.0, first - taken - again))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
