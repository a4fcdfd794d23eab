"""What a checkpoint costs: how long training stands still for it, how long it takes to write, what the checksums add.

    python scripts/bench/checkpoint.py --size mini --saves 5 --folder /some/disk
    python scripts/bench/checkpoint.py --size 160m --saves 3 --folder /dev/shm      # memory: no disk to hide behind

Each save is timed from the call to its return (the stall) and to the manifest (the whole); then once more with the
hashing left out, save by save in turn, so that what else the machine does falls on both alike. One line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from titan_cpt import checkpoint_files
from titan_cpt.checkpoint import INTERVAL, Checkpoints
from titan_cpt.models.families import build_model
from titan_cpt.models.sizes import named_size
from titan_cpt.optimizer import build_adamw

RECORD = {"stage_index": 0, "kind": INTERVAL, "run_step": 0, "recipe": {}, "fingerprint": "", "data": {}}


class _NoHash:
    """Stands in for SHA-256."""

    def update(self, block: bytes) -> None:
        """Nothing."""

    def hexdigest(self) -> str:
        """As long as a real one."""
        return "0" * 64


def main() -> None:
    """Read the arguments, save, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="gpt_neox")
    parser.add_argument("--size", default="mini")
    parser.add_argument("--saves", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    model = build_model(named_size(options.family, options.size, 50_304, 1, {}))
    optimizer = build_adamw(model, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    run = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=options.folder))
    try:
        timed = {"hashed": [], "plain": []}  # type: dict[str, list[tuple[float, float]]]
        checkpoints = Checkpoints(run, keep_latest=1, asynchronous=True, on_saved=lambda folder: None)
        for number in range(2 * options.saves + 2):
            kind = "hashed" if number % 2 else "plain"
            checkpoint_files.new_hash = hashlib.sha256 if kind == "hashed" else _NoHash
            measured = _timed_save(checkpoints, model, optimizer, number)
            if number >= 2:  # the first of each kind warms up
                timed[kind].append(measured)
        size = sum(path.stat().st_size for path in next(run.glob("*/step-*")).iterdir())
    finally:
        shutil.rmtree(run)
    whole = {kind: statistics.median(seconds for _, seconds in of_kind) for kind, of_kind in timed.items()}
    print(
        json.dumps(
            {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "bytes": size,
                "stall_s": round(statistics.median(stall for stall, _ in timed["hashed"]), 4),
                "save_s": round(whole["hashed"], 4),
                "save_without_checksums_s": round(whole["plain"], 4),
                "checksums_share": round((whole["hashed"] - whole["plain"]) / whole["hashed"], 4),
                "gb_per_s": round(size / whole["hashed"] / 1e9, 3),
                "sha256_alone_s": round(_sha256_alone(size), 4),
                "saves": options.saves,
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "load": os.getloadavg()[0],
            }
        )
    )


def _timed_save(checkpoints: Checkpoints, model: Any, optimizer: Any, number: int) -> tuple[float, float]:
    os.sync()
    began = time.perf_counter()
    checkpoints.save(model, optimizer, stage="a", steps_done=number, record=RECORD)
    stall = time.perf_counter() - began
    checkpoints.wait()
    return stall, time.perf_counter() - began


def _sha256_alone(size: int) -> float:
    block, digest, began = os.urandom(1 << 22), hashlib.sha256(), time.perf_counter()
    for _ in range(size >> 22):
        digest.update(block)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
