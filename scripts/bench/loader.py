"""Measure the loader: its throughput, and the time to the first batch in the middle of a very long run.

    python scripts/bench/loader.py [--consumes 150000]

First table: tokens per second of one rank's loader over a stage with 5 % replay, sequences of 2,048, files in the page
cache, without and with reading processes, as a multiple of --consumes, the tokens per second of the training rank.
Second table: a stage of 10^12 tokens on a sparse file of 2 TB. A separate process plans it, opens it, and reads the
batch at three positions; the time is from config to batch, the memory is the growth of the process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from titan_cpt.train import Trainer

CONFIG = """
[job]
name = "loader"
[model]
family = "gpt_neox"
size = "debug"
[datasets.old]
train = "{folder}/old.bin"
format = "raw"
dtype = "uint16"
[datasets.new]
train = "{folder}/{new}.bin"
format = "raw"
dtype = "uint16"
[training]
global_batch_size = {batch}
local_batch_size = {batch}
seq_len = 2048
[[stages]]
name = "first"
dataset = "old"
steps = 10
lr = {{ schedule = "constant", max = 1e-3 }}
[[stages]]
name = "second"
dataset = "new"
{length}
lr = {{ schedule = "cosine", max = 1e-3 }}
replay = {{ fraction = 0.05, on_exhausted = "repeat" }}
"""
SMALL_TOKENS, HUGE_TOKENS = 50_000_000, 10**12
PLACES = (0.0, 0.5, 0.999)


def opened(path: Path, workers: int, place: float = 0.0) -> tuple[Any, int]:
    """The loader of a config's second stage, started at the fraction `place` of its steps, and that step."""
    from titan_cpt.config.load import load_config
    from titan_cpt.data.inventory import open_sources, take_inventory, training_files
    from titan_cpt.data.loader import SequenceReader
    from titan_cpt.planning.planner import make_plan

    config = load_config(path, [("training.num_workers", str(workers))])
    plan = make_plan(config, take_inventory(config))
    reader = SequenceReader(open_sources(training_files(config), 257), seq_len=plan.seq_len, seed=plan.seed)
    stage = plan.stages[1]
    step = int(place * (stage.steps - 1))
    trainer = SimpleNamespace(readers={stage.name: reader}, plan=plan, config=config, mesh=SimpleNamespace(data_rank=0))
    return Trainer.open_loader(trainer, stage, step), step  # type: ignore[arg-type]  # the fields that it reads


def throughput(path: Path, workers: int, seconds: float) -> float:
    """Tokens per second after the first batch, measured for `seconds`."""
    loader, step = opened(path, workers)
    loader.batch(step, 0)
    begin, tokens = time.perf_counter(), 0
    for following in itertools.count(step + 1):
        tokens += loader.batch(following, 0).inputs_BL.numel()
        if time.perf_counter() - begin > seconds:
            break
    return tokens / (time.perf_counter() - begin)


def seek(path: Path, place: float) -> None:
    """Print step, batch shape, seconds and bytes of the first batch at `place`, as JSON."""
    import titan_cpt.train  # noqa: F401  # so that the time does not include the import

    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    begin = time.perf_counter()
    loader, step = opened(path, 0, place)
    batch_BL = loader.batch(step, 0).inputs_BL
    seconds = time.perf_counter() - begin
    print(json.dumps([step, list(batch_BL.shape), seconds, status_bytes("VmHWM") - before]))


def status_bytes(name: str) -> int:
    """VmRSS (current) or VmHWM (peak) resident memory of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--consumes", type=float, default=150_000, help="tokens per second of the training rank")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement")
    parser.add_argument("--seek", nargs=2, metavar=("FILE", "PLACE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seek:
        return seek(Path(options.seek[0]), float(options.seek[1]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        for which in ("old", "new"):
            rng.integers(0, 257, SMALL_TOKENS, dtype=np.uint16).tofile(folder / f"{which}.bin")
        with open(folder / "huge.bin", "wb") as file:
            file.truncate(2 * HUGE_TOKENS)
        small, huge = folder / "small.toml", folder / "huge.toml"
        small.write_text(CONFIG.format(folder=folder, new="new", batch=8, length="steps = 1_000_000"))
        huge.write_text(CONFIG.format(folder=folder, new="huge", batch=8, length='tokens = "1T"'))
        print("| reading processes | tokens/s | x what training consumes |\n|---|---|---|")
        for workers in (0, 1):
            speed = throughput(small, workers, options.seconds)
            print(f"| {workers} | {speed / 1e6:.1f}M | {speed / options.consumes:.0f} |", flush=True)
        print("\n| step of 10^12 tokens | batch | seconds | MB |\n|---|---|---|---|")
        for place in PLACES:
            words = [sys.executable, __file__, "--seek", str(huge), str(place)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            step, shape, seconds, grown = json.loads(done.stdout)
            print(f"| {step:,} | {' x '.join(map(str, shape))} | {seconds:.2f} | {grown / 1e6:.0f} |", flush=True)
    return None


if __name__ == "__main__":
    main()
