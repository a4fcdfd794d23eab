"""What a run writes down: metrics.jsonl and TensorBoard, the speed, the share of the device's peak, the memory.

The device's numbers of each step stay on the device until `flush`, so that a step waits for nothing. metrics.jsonl is
the record: reports, forgetting and summaries are read from it. After a resume it holds some steps twice, and the last
line for a (kind, stage, step, dataset) counts.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_cpt.errors import DataError

FILE_NAME = "metrics.jsonl"

# Dense peak of one device in bfloat16, FLOP/s, from the makers' data sheets.
_CUDA_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


class ScalarWriter(Protocol):
    """The part of TensorBoard's SummaryWriter that is used here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """One point of one curve."""

    def flush(self) -> None:
        """Bring what was added to the disk."""

    def close(self) -> None:
        """Flush and let go of the file."""


class MetricsLog:
    """Writes a run's record; on ranks other than 0 it only keeps time.

    Args:
        run: the run's folder.
        writing: whether this rank writes.
        tensorboard: events go here too; None for none.
        flops_per_token: of training, for the share of the peak.
        peak_flops: of all ranks together, FLOP/s.
    """

    def __init__(
        self, run: Path, *, writing: bool, tensorboard: ScalarWriter | None, flops_per_token: int, peak_flops: float
    ) -> None:
        self._record = open_record(run / FILE_NAME) if writing else None
        self._unwritten = b""
        self.trouble = ""
        """Why lines wait in memory for room on the disk; empty while all is well."""
        self.before = losses_before(run) if writing else {}
        """Loss at step 0 by (stage, dataset): what forgetting is measured from."""
        self._tensorboard = tensorboard
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._pending: list[tuple[dict[str, Any], Tensor]] = []
        self._tokens = 0
        self._since = time.perf_counter()

    def step(
        self, numbers: dict[str, Any], *, loss: Tensor, grad_norm: Tensor, tokens: int, health: Tensor | None = None
    ) -> None:
        """Keep one step: what the host knows, and what the device still computes.

        Args:
            health: what `UpdateGuard.observe` returned.
        """
        told = torch.zeros(2, device=loss.device) if health is None else health
        self._pending.append((numbers, torch.stack([loss.float(), grad_norm.float(), *told])))
        self._tokens += tokens

    def flush(self) -> list[dict[str, Any]]:
        """Wait for the device, write the steps kept, and return their lines.

        The lines returned hold two more keys: whether the guard held the step back, and its loss's z-score.
        """
        if not self._pending:
            return []
        values = torch.stack([device for _, device in self._pending]).tolist()
        elapsed = time.perf_counter() - self._since
        speed = self._tokens / elapsed if elapsed > 0 else math.nan
        shared = {
            "tokens_per_s": speed,
            "mfu": speed * self._flops_per_token / self._peak_flops,
            "memory_gib": memory_gib(),
        }
        lines = []
        for (numbers, _), (loss, grad_norm, held_back, z_score) in zip(self._pending, values, strict=True):
            batch_hash = numbers.pop("batch_hash")
            line = {"kind": "train", **numbers, "loss_nats_per_token": loss, "grad_norm": grad_norm, **shared}
            lines.append({**line, "held_back": held_back > 0, "loss_z_score": z_score})
            self._write({**line, "batch_hash": batch_hash})
            self._scalars(line["run_step"], {f"train/{key}": line[key] for key in ("loss_nats_per_token", "grad_norm")})
            self._scalars(line["run_step"], {"train/lr": line["lr"], "data/replayed_tokens": line["replayed_tokens"]})
        self._scalars(lines[-1]["run_step"], {f"throughput/{key}": value for key, value in shared.items()})
        self._pending.clear()
        self._sync()
        self.restart_clock()
        return lines

    def restart_clock(self) -> None:
        """Leave out of the speed what was not training: validation, saving, waiting."""
        self._since, self._tokens = time.perf_counter(), 0

    def validation(self, line: dict[str, Any], run_step: int) -> None:
        """One dataset's loss."""
        self._write({"kind": "validation", **line})
        dataset = line["dataset"]
        numbers = {f"validation/{dataset}/{key}": line[key] for key in ("loss_nats_per_token", "bits_per_byte")}
        if line["forgetting_nats_per_token"] is not None:
            numbers[f"forgetting/{dataset}"] = line["forgetting_nats_per_token"]
        self._scalars(run_step, numbers)
        self._sync()

    def event(self, name: str, **fields: Any) -> None:
        """Something that happened: start, transition, checkpoint, anneal, resume, skip, stop."""
        self._write({"kind": "event", "name": name, "time": time.time(), **fields})
        self._sync()

    def close(self) -> None:
        """Let go of the files."""
        record, self._record = self._record, None
        if record is not None:
            try:
                self._write_out(record)
            finally:
                record.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._record is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            self._unwritten += (json.dumps(finite) + "\n").encode()

    def _sync(self) -> None:
        """Bring what was written to the disk; where there is no room, it waits in memory and training goes on."""
        try:
            self.secure()
        except OSError as error:
            self.trouble = (
                f"{FILE_NAME} cannot be written: {error.strerror}; {len(self._unwritten)} bytes wait in memory"
            )

    def secure(self) -> None:
        """All that was written is on the disk when this returns: no checkpoint is made before what led to it.

        Raises:
            OSError: it could not be; nothing is lost, and the next call tries again.
        """
        if self._record is not None:
            self._write_out(self._record)
            self.trouble = ""

    def _write_out(self, record: FileIO) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[record.write(self._unwritten) :]
        os.fsync(record.fileno())

    def _scalars(self, run_step: int, numbers: dict[str, float]) -> None:
        if self._tensorboard is not None:
            try:
                for tag, value in numbers.items():
                    self._tensorboard.add_scalar(tag, value, run_step)
            except OSError as error:  # its writing thread found no room; the record goes on without the curves
                self._tensorboard = None
                self.event("tensorboard_lost", why=str(error))


def open_record(path: Path) -> FileIO:
    """Open metrics.jsonl to append, unbuffered; a last line that a kill cut short is taken away."""
    path.touch()
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    return path.open("ab", buffering=0)


def losses_before(run: Path) -> dict[tuple[str, str], float]:
    """Loss at step 0 by (stage, dataset), as far as the run has come."""
    return {
        (line["stage"], line["dataset"]): line["loss_nats_per_token"]
        for line in read_record(run)
        if line["kind"] == "validation" and line["step"] == 0
    }


def read_record(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order, those written twice included; a cut last line is passed over.

    Raises:
        DataError: there is no such file, or a line that is not the last is damaged.
    """
    path = run / FILE_NAME
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Name the folder of a run") from None
    for number, line in enumerate(lines, 1):
        if number == len(lines):
            return  # empty, or being written, or cut short
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or "kind" not in record:
            raise DataError(f"{path}:{number}: is not a line of this record; it was damaged after it was written")
        yield record


def versions(device: torch.device) -> dict[str, str]:
    """What the numbers were made with: the program, torch, Python and the device."""
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    ours = metadata.version("titan_cpt")
    return {"titan_cpt": ours, "torch": torch.__version__, "python": platform.python_version(), "on": cuda}


def memory_gib() -> float:
    """Peak memory of this process: what CUDA reserved where there is CUDA, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there and in KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_flops(device: torch.device, precision: torch.dtype) -> float:
    """What one device can do in matrix products, FLOP/s: from the data sheet, or for a CPU measured here in 0.1 s.

    A CUDA device without an entry gives NaN, so that its share of the peak is not made up.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for known, peak in _CUDA_PEAKS.items() if known in name), math.nan)
    size = 1024
    a = torch.ones(size, size, dtype=precision)
    a @ a
    best, until = math.inf, time.perf_counter() + 0.1
    while time.perf_counter() < until:
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
