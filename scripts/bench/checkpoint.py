"""Measure the cost of a checkpoint: how long training waits, how fast it is written, what the checksums add.

    python scripts/bench/checkpoint.py --size mini --saves 5 --folder /some/disk
    python scripts/bench/checkpoint.py --size 405m --saves 3 --folder /dev/shm      # in memory, without a disk

Three kinds take turns, so that other work on the machine affects all of them equally: ours; ours without hashing; and
torch's own files (DCP's FileSystemWriter, two threads, synced) of the same tensors. Each save is timed from the call to
its return (the stall) and to its end (the manifest, for ours). On a machine with a GPU the model is on the GPU. The
first round warms up: it allocates the memory of the copy that is written. Prints one line of JSON, in seconds and GB/s;
medians.
"""

from __future__ import annotations

import argparse
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
import xxhash
from device import device, wait
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

from titan_cpt.checkpoint import storage
from titan_cpt.checkpoint.manager import CheckpointManager
from titan_cpt.common.run_folder import INTERVAL
from titan_cpt.models.build import build_model
from titan_cpt.models.registry import named_size
from titan_cpt.training.optimization.adamw import build_adamw

RECORD = {"stage_index": 0, "kind": INTERVAL, "run_step": 0, "recipe": {}, "fingerprint": "", "data": {}}
KINDS = ("ours", "unhashed", "dcp")


class _NoHash:
    """Replaces the checksum."""

    def update(self, block: memoryview) -> None:
        """Do nothing."""

    def hexdigest(self) -> str:
        """A string as long as a real checksum."""
        return "0" * 32


class Bench:
    """One model with its moments, saved repeatedly in one folder."""

    def __init__(self, family: str, size: str, run: Path) -> None:
        self.model = build_model(named_size(family, size, 50_304)).to(device())
        self.optimizer = build_adamw(self.model, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        self.run = run
        self.checkpoints = CheckpointManager(run, keep_latest=1, async_save=True, on_saved=lambda folder: None)
        self.stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))

    def timed(self, kind: str, number: int) -> tuple[float, float, int]:
        """Stall and whole time of a save, in seconds, and its bytes; removes the checkpoint afterwards."""
        os.sync()
        wait()
        began = time.perf_counter()
        ended, folder = self._dcp(number) if kind == "dcp" else self._ours(kind, number)
        stall = time.perf_counter() - began
        ended()
        whole = time.perf_counter() - began
        size = sum(path.stat().st_size for path in folder.iterdir())
        shutil.rmtree(folder)
        return stall, whole, size

    def _ours(self, kind: str, number: int) -> tuple[Any, Path]:
        storage.new_hash = xxhash.xxh3_128 if kind == "ours" else _NoHash  # type: ignore[assignment]
        self.checkpoints.save(self.model, self.optimizer, stage="a", steps_done=number, record=RECORD)
        return self.checkpoints.wait, self.run / "a" / f"step-{number:08d}"

    def _dcp(self, number: int) -> tuple[Any, Path]:
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        folder = self.run / f"dcp-{number}"
        writer = FileSystemWriter(folder, thread_count=2, sync_files=True)
        state = {"model": self.model.state_dict(), "optimizer": moments}
        saving: Any = async_save(state, storage_writer=writer, async_stager=self.stager)
        return saving.result, folder


def main() -> None:
    """Read the arguments, save, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="gpt_neox")
    parser.add_argument("--size", default="mini")
    parser.add_argument("--saves", type=int, default=5, help="saves of each kind (default 5)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    run = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=options.folder))
    try:
        bench = Bench(options.family, options.size, run)
        rounds = [{kind: bench.timed(kind, number) for kind in KINDS} for number in range(options.saves + 1)][1:]
        parameters = sum(parameter.numel() for parameter in bench.model.parameters())
    finally:
        shutil.rmtree(run)
    result: dict[str, Any] = {"parameters": parameters, "bytes": rounds[0]["ours"][2]}
    for kind in KINDS:
        stall, whole = (statistics.median(one[kind][what] for one in rounds) for what in (0, 1))
        result |= {f"{kind}_stall_s": round(stall, 3), f"{kind}_save_s": round(whole, 3)}
        result |= {f"{kind}_gb_per_s": round(result["bytes"] / whole / 1e9, 3)}
    result |= {"checksums_share": round(1 - result["unhashed_save_s"] / result["ours_save_s"], 3)}
    result |= {"checksum_only_s": round(_checksum_only(result["bytes"]), 3), "saves": options.saves}
    result |= {"threads": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    print(json.dumps(result))


def _checksum_only(size: int) -> float:
    block, digest, began = os.urandom(1 << 22), xxhash.xxh3_128(), time.perf_counter()
    for _ in range(size >> 22):
        digest.update(block)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
