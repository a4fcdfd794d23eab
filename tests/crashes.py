"""The crash matrix: kill a run with SIGKILL many times, at chosen and random moments, and compare its results.

Each start of a run is `titan-cpt train --config ...` in a process forked from a server that has torch imported, so that
a restart takes a fraction of a second. Some batches are bad and skipped, so that the skips must survive too.
scripts/crash_matrix.py runs it for any length of time.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faulty
import training
from faulty import BadNumbers
from training import Fault

from titan_cpt.checkpoint import manifest
from titan_cpt.common.run_folder import MANIFEST_FILE
from titan_cpt.errors import CheckpointError

KILLED, TERMINATED, STOPPED, DONE = -9, -15, 75, 0

# Where a process is killed: a function, and the number of its calls from which the fatal one is drawn.
MOMENTS: dict[str, tuple[tuple[str, int], ...]] = {
    "a step": (("titan_cpt.train:Trainer.train_step", 7), ("torch.optim:AdamW.step", 7)),
    "a save, before its shards": (("titan_cpt.checkpoint.storage:ShardWriter.write_data", 3),),
    "a save, between files and manifest": (("titan_cpt.checkpoint.manifest:write", 3),),
    "a save, while it hashes or syncs": (("titan_cpt.checkpoint.manifest:fsync", 20),),
    "pruning": (("shutil:rmtree", 2), ("os:unlink", 9)),
    "a stage's end": (("titan_cpt.train:write_summary", 1),),
    "a transition": (
        ("titan_cpt.train:begin_stage", 1),
        ("titan_cpt.training.stage_start:load_state", 1),
        ("titan_cpt.training.stage_start:_apply_stage_hyperparameters", 1),
    ),
    "the measurement at a stage's start": (("titan_cpt.training.validation:Validator._loss", 2),),
    "validation": (("titan_cpt.training.validation:Validator._loss", 8),),
    "passing over a batch": (
        ("titan_cpt.training.skipped_batches:SkippedBatches.add", 1),
        ("titan_cpt.training.optimization.update:UpdateGuard.reset", 1),
    ),
    "starting": (("titan_cpt.training.build:find_checkpoint", 1), ("titan_cpt.train:Trainer.stage_steps", 1)),
    "any moment, from outside": (),
}


@dataclass
class Toll:
    """Counts of what has happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    stops: int = 0
    finished: int = 0
    damaged: list[str] = field(default_factory=list)
    """Checkpoints with a manifest that did not verify right after a kill."""
    mismatches: list[str] = field(default_factory=list)
    """Numbers and tensors that differ from those of the uninterrupted run."""

    @property
    def total(self) -> int:
        """Kills of all kinds."""
        return sum(self.kills.values())

    def summary(self) -> str:
        """A table, and the three numbers that matter."""
        rows = [f"  {count:5}  {moment}" for moment, count in sorted(self.kills.items())]
        last = (
            f"kills {self.total}, resumes {self.resumes}, stops by SIGTERM {self.stops}, "
            f"finished runs {self.finished}, damaged {len(self.damaged)}, mismatches {len(self.mismatches)}"
        )
        return "\n".join([*rows, last, *self.damaged, *self.mismatches])


def small_run(folder: Path) -> dict[str, Any]:
    """Stages of 8 and 6 steps; a checkpoint every 3 steps, validation every 4; three bad batches.

    The first stage has a batch-size ramp, from 2 to 4 sequences at step 4; the second has twice its length.
    """
    raw = training.two_stages(training.write_languages(folder), folder)
    raw = training.changed(
        raw,
        model={"layers": 1, "width": 32, "heads": 2},
        training={"seq_len": 8, "local_batch_size": 1, "on_nonfinite": "skip"},
        checkpoint={"interval": 3, "keep_latest_k": 1, "keep_every": 6},
        metrics={"log_freq": 2},
        validation={"interval": 4, "sequences": 4},
    )
    raw["stages"][0] |= {"steps": 8, "global_batch_size": {"0": 2, "64": 4}}
    raw["stages"][1] |= {"steps": 6, "global_batch_size": 2, "seq_len": 16}
    return raw


BAD = (BadNumbers("english", (2, 6)), BadNumbers("german", (1,)))
ENDS = ("english/step-00000006", "english/step-00000008", "german/step-00000006")


class Matrix:
    """Kills runs until there were enough kills, and trains the last run to its end.

    Args:
        folder: for data and runs.
        seed: of every choice.
        ranks: processes of a run, one of which is killed.
    """

    def __init__(self, folder: Path, *, seed: int, ranks: int = 1) -> None:
        self.folder, self.ranks, self.rng = folder, ranks, random.Random(seed)
        self.raw = small_run(folder)
        self.toll = Toll()
        self._runs = 0
        self._config = self._named("unbroken")
        status = self._live(())

        assert status == DONE, "the unbroken run did not end well"
        self.unbroken = folder / "unbroken"

    def run_until(self, kills: int, tell: Callable[[str], None] = lambda line: None) -> Toll:
        """Kill until there were `kills` kills, then finish the current run."""
        while self.toll.total < kills:
            self._runs += 1
            run = self.folder / f"run-{self._runs}"
            self._config = self._named(run.name)
            self._one_run(run, kills)
            self.toll.resumes += len(training.events_of(run, "resume"))
            self._compare(run)
            shutil.rmtree(run)
            tell(f"{self.toll.total} kills, {len(self.toll.mismatches)} mismatches after {run.name}")
        return self.toll

    def _named(self, name: str) -> Path:
        raw = training.changed(self.raw, job={"name": name})
        return training.write_config(raw, self.folder / f"{name}.toml")

    def _one_run(self, run: Path, kills: int) -> None:
        """Start one run again and again, until one process reaches the run's end."""
        while True:
            if self.toll.total >= kills:
                moment, status = "", self._live(())
            else:
                moment, status = self._cut_short()
            if status == DONE:
                self.toll.finished += 1
                return
            self.toll.stops += status == STOPPED
            if status in (KILLED, TERMINATED):  # the second is a SIGTERM before anyone listened to it
                self.toll.kills[moment] += 1
            elif status != STOPPED:
                self.toll.mismatches.append(f"{run.name}: ended with {status} at {moment}")
                return
            self._check_what_looks_alive(run)

    def _cut_short(self) -> tuple[str, int]:
        moment = self.rng.choice([*MOMENTS, "SIGTERM"])
        if not MOMENTS.get(moment):
            return moment, self._live((), after_s=self.rng.uniform(0.05, 0.9), number=15 if moment == "SIGTERM" else 9)
        place, most = self.rng.choice(MOMENTS[moment])
        return moment, self._live((Fault(place, self.rng.randint(1, most)),))

    def _live(self, faults: tuple[Fault, ...], *, after_s: float | None = None, number: int = 9) -> int:
        """One start on all ranks; returns the exit status of the rank that gets the fault or the signal."""
        victim = self.rng.randrange(self.ranks)
        started = faulty.start_ranks(self._config, faults=(*BAD, *faults), ranks=self.ranks, only=victim)
        process = started[victim][0]
        if after_s is not None:
            process.join(after_s)
            if process.is_alive():
                os.kill(process.pid, number)
        faulty.outcome_of(*started[victim])
        until = time.monotonic() + 20
        for other, output in started:
            other.join(max(0.0, until - time.monotonic()))
            faulty.kill(other)  # one whose peer is gone and which waits still
            other.join()
            output.unlink(missing_ok=True)
        return int(process.exitcode)

    def _check_what_looks_alive(self, run: Path) -> None:
        for path in run.glob(f"*/step-*/{MANIFEST_FILE}"):
            try:
                manifest.verify(path.parent)
            except CheckpointError as error:
                self.toll.damaged.append(str(error))

    def _compare(self, run: Path) -> None:
        expected, found = training.numbers_of(self.unbroken), training.numbers_of(run)
        for key in sorted({*expected, *found}, key=str):
            if expected.get(key) != found.get(key):
                self.toll.mismatches.append(f"{run.name}: {key}: {expected.get(key)} became {found.get(key)}")
        for name in ENDS:
            for part in ("model", "optimizer"):
                pair = [training.tensors_of(one / name, part) for one in (self.unbroken, run)]
                if not training.same_bits(*pair):
                    self.toll.mismatches.append(f"{run.name}: {part} of {name}")
