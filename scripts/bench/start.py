"""Time from the start of the process to the first training step, compared with the import of torch.

    python scripts/bench/start.py [--turns 5]

Three processes take turns: `import torch, torch.distributed.fsdp`; a run to the end of its first step, a sequence of
512 tokens of shape B, on a GPU if there is one; the same with compiled blocks, whose cache an uncounted run fills
first. Medians of wall seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from shape_b import HEAD, SHAPES, STAGE

from titan_cpt.data.formats.indexed_writer import IndexedWriter

ONE_SHORT_STEP = ["--training.global_batch_size", "1", "--training.local_batch_size", "1", "--metrics.log_freq", "1"]


def seconds_to(words: list[str], folder: Path, sign: str) -> float:
    """Wall seconds from the start of a process to the line that contains `sign`, or to its end if `sign` is empty."""
    begin = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None, "it was started with a pipe"
    lines = []
    for line in process.stdout:
        lines.append(line)
        if sign and sign in line:
            seconds = time.perf_counter() - begin
            process.kill()
            process.wait()
            return seconds
    if process.wait() or sign:
        sys.exit("".join(lines[-20:]))
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = HEAD.format(folder=folder, interval=1000, **SHAPES["B"]) + STAGE.format(number=0, steps=100)
        (folder / "start.toml").write_text(text)
        with IndexedWriter(folder / "noise", 257) as writer:
            writer.add_document(np.random.default_rng(0).integers(0, 257, size=200_000))
        trains = [sys.executable, "-m", "titan_cpt", "train", "--config", "start.toml", *ONE_SHORT_STEP]
        entries = {
            "import torch, torch.distributed.fsdp": (
                [sys.executable, "-c", "import torch, torch.distributed.fsdp"],
                "",
            ),
            "run to its first step": (trains, "step 1/"),
            "compiled, warm cache": ([*trains, "--compile.enable", "true"], "step 1/"),
        }
        times: dict[str, list[float]] = {what: [] for what in entries}
        for turn in range(turns + 1):
            for what, (words, sign) in entries.items():
                shutil.rmtree(folder / "bench", ignore_errors=True)
                taken = seconds_to(words, folder, sign)
                if turn:  # the first turn fills the disk's and the compiler's caches
                    times[what].append(taken)
    print("| | seconds | more than the line above |\n|---|---|---|")
    above = None
    for what, taken in times.items():
        middle = statistics.median(taken)
        print(f"| {what} | {middle:.2f} | {'' if above is None else f'{middle - above:+.2f}'} |")
        above = middle


if __name__ == "__main__":
    main()
