"""Writes metrics.jsonl and TensorBoard curves: losses, gradient norms, tokens/s, MFU, memory, events.

Losses and gradient norms stay on the device until `flush`, so that a step has no host sync. Reports, forgetting and
summaries are computed from metrics.jsonl; common/metrics_file.py reads it and knows which of its lines count after a
crash, a rollback or a stage that was trained again. TensorBoard gets the same curves, without duplicate steps.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from titan_cpt.common.gpus import peak_flops_of
from titan_cpt.common.metrics_file import Metrics, baseline_losses, open_metrics_file, read_metrics, table_curves
from titan_cpt.common.run_folder import METRICS_FILE
from titan_cpt.common.version import own_version

_OVER_TOKENS = ("train", "validation", "forgetting")  # groups of tags that are also drawn over tokens


class ScalarWriter(Protocol):
    """The methods of TensorBoard's SummaryWriter that are used here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """One point of one curve."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> None:
        """A text in Markdown."""

    def flush(self) -> None:
        """Write buffered points to the disk."""

    def close(self) -> None:
        """Flush and close the file."""


class _EventsFile:
    """TensorBoard events, written from the first point on, so that a run with nothing to do writes no file.

    Args:
        open_writer: opens a writer, given the first obsolete x value (`purge_step`) or None.
        x_of: the x value after a number of steps of the run, which increases with them.
    """

    def __init__(self, open_writer: Callable[[int | None], ScalarWriter], x_of: Callable[[int], int]) -> None:
        self._open, self._x_of = open_writer, x_of
        self._writer: ScalarWriter | None = None
        self._obsolete_from: int | None = None
        self._opened_at = 0
        self._newest_step = math.inf  # an earlier session may have written any step
        self.config = ""
        """TOML that is written as a text before the first point."""

    def add(self, points: Mapping[str, float], run_step: int) -> None:
        """Write a point of each curve."""
        if self._writer is None:
            # TensorBoard sorts the files of a folder by name, which begins with the second in which they were opened.
            while int(time.time()) == self._opened_at:
                time.sleep(0.01)
            self._opened_at = int(time.time())
            self._writer = self._open(self._obsolete_from)
        if self.config:
            step = max(0, (self._obsolete_from or 0) - 1)
            self._writer.add_text("config", f"```toml\n{self.config}\n```", step)
            self.config = ""
        for tag, value in points.items():
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, self._x_of(run_step))
        self._newest_step = max(self._newest_step, run_step)

    def rewind(self, run_step: int) -> None:
        """Continue after this step: TensorBoard hides the points of later steps."""
        if run_step < self._newest_step:
            self.close()
            self._writer, self._newest_step = None, run_step
            self._obsolete_from = self._x_of(run_step) + 1

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()


class SumsBySource(NamedTuple):
    """One rank's sums of a step.

    Attributes:
        sums_S2: loss in nats and number of targets of every source, on the device; rows after the last source are 0.
        sources: (source, whether it is replayed), in the order of the rows.
    """

    sums_S2: Tensor
    sources: Sequence[tuple[str, bool]]


def by_source_keys(
    sources: Sequence[tuple[str, bool]], sums: Sequence[tuple[float, float]]
) -> dict[str, dict[str, float]]:
    """The keys of a `train` line with the mean loss and the number of target tokens of every source in the step.

    Args:
        sums: loss in nats and number of targets of each source, over all ranks.
    """
    keys: dict[str, dict[str, float]] = {}
    for (source, replayed), (nats, targets) in zip(sources, sums, strict=False):
        prefix = "replay_" if replayed else ""
        if targets:
            keys.setdefault(f"{prefix}tokens_by_source", {})[source] = int(targets)
            if math.isfinite(nats):
                keys.setdefault(f"{prefix}loss_by_source", {})[source] = nats / targets
    return keys


class MetricsLog:
    """Writes a run's metrics; on ranks other than 0 it only measures throughput.

    Args:
        run: the run's folder.
        writing: whether this rank writes.
        tensorboard: opens a TensorBoard writer, given the step from which older points are obsolete (`purge_step`) or
            None. It is called at the first point, so that a run with nothing to do writes no events file. None for a
            run without TensorBoard.
        over_tokens: opens a second writer, whose x axis is tokens: losses and forgetting, with tags of their own in a
            folder of their own, because TensorBoard's purge_step would hide all points of a folder.
        tokens_at: tokens of the run after a number of its steps.
        peak_flops: sum over all ranks in FLOP/s; NaN if unknown.
        stages: names of the stages, in the order of the plan.
        sum_over_ranks: sums a tensor over all ranks; collective.

    Raises:
        DataError: metrics.jsonl cannot be opened. Damaged lines are named in `problems`.
    """

    def __init__(
        self,
        run: Path,
        *,
        writing: bool,
        tensorboard: Callable[[int | None], ScalarWriter] | None,
        peak_flops: float,
        stages: Sequence[str] = (),
        over_tokens: Callable[[int | None], ScalarWriter] | None = None,
        tokens_at: Callable[[int], int] = int,
        sum_over_ranks: Callable[[Tensor], Tensor] = torch.clone,
    ) -> None:
        self._record = open_metrics_file(run / METRICS_FILE) if writing else None
        self._unwritten = b""
        self.trouble = ""
        """Why lines wait in memory instead of on the disk; empty if none do."""
        recorded = read_metrics(run, stages) if writing else Metrics()
        self.problems = recorded.problems
        """Lines of the existing metrics.jsonl that could not be read."""
        self.baselines = baseline_losses(recorded)
        """Baselines of forgetting by (stage, dataset): the loss at step 0, and the identity of its validation set (None
        in lines of older versions)."""
        self.last_start = next((line for line in reversed(recorded.events) if line["name"] == "start"), {})
        """The `start` event of the last session."""
        self._identities = {line["dataset"]: line.get("validation_id") for line in recorded.validations}
        self.is_new = not (recorded.trains or recorded.validations)
        """Whether no earlier session has written a point."""
        self._stage_numbers = {name: number for number, name in enumerate(stages, 1)}
        self._over_steps = None if tensorboard is None else _EventsFile(tensorboard, int)
        self._over_tokens = None if over_tokens is None else _EventsFile(over_tokens, tokens_at)
        self._peak_flops = peak_flops
        self._pending: list[tuple[dict[str, Any], Tensor]] = []
        self._pending_sums: list[SumsBySource | None] = []
        self._sum_over_ranks = sum_over_ranks
        self._tokens = 0
        self._flops = 0.0
        self._since = time.perf_counter()

    def step(
        self,
        fields: dict[str, Any],
        *,
        loss: Tensor,
        grad_norm: Tensor,
        tokens: int,
        flops_per_token: float,
        health: Tensor | None = None,
        by_source: SumsBySource | None = None,
    ) -> None:
        """Add a step: values that the host knows, and tensors that the device may still be computing. No host sync.

        Args:
            fields: the keys of its line, except loss and gradient norm.
            tokens: tokens of the step, for the throughput.
            flops_per_token: FLOP of the step per token, for MFU.
            health: the result of `UpdateGuard.observe`; None for a skipped batch.
            by_source: this rank's sums by source; None for a skipped batch.
        """
        flags = torch.zeros(2, device=loss.device) if health is None else health
        self._pending.append((fields, torch.stack([loss.float(), grad_norm.float(), *flags])))
        self._pending_sums.append(by_source)
        self._tokens += tokens
        self._flops += flops_per_token * tokens

    def flush(self) -> list[dict[str, Any]]:
        """Wait for the device, write the steps added since the last call, and return their lines; collective.

        The returned lines have two more keys: `held_back`, whether the guard prevented the update, and `loss_z_score`.
        """
        if not self._pending:
            return []
        by_source = self._summed_by_source()
        values = torch.stack([tensor for _, tensor in self._pending]).tolist()
        elapsed = time.perf_counter() - self._since
        speed = self._tokens / elapsed if elapsed > 0 else math.nan
        shared = {
            "tokens_per_s": speed,
            "mfu": self._flops / elapsed / self._peak_flops if elapsed > 0 else math.nan,
            **peak_memory(),
        }
        lines = []
        steps = zip(self._pending, values, by_source, strict=True)
        for (fields, _), (loss, grad_norm, held_back, z_score), sources in steps:
            batch_hash = fields.pop("batch_hash")
            line = {"kind": "train", **fields, "loss_nats_per_token": loss, "grad_norm": grad_norm, **sources, **shared}
            lines.append({**line, "held_back": held_back > 0, "loss_z_score": z_score})
            self._write({**line, "batch_hash": batch_hash})
            self._scalars(line["run_step"], {f"train/{key}": line[key] for key in ("loss_nats_per_token", "grad_norm")})
            self._scalars(line["run_step"], {"train/lr": line["lr"], "data/replayed_tokens": line["replayed_tokens"]})
            self._scalars(line["run_step"], table_curves(line))
        if lines[-1]["stage"] in self._stage_numbers:
            self._scalars(lines[-1]["run_step"], {"data/stage": self._stage_numbers[lines[-1]["stage"]]})
        points = {f"throughput/{key}": value for key, value in shared.items() if key != "memory_active_gib"}
        if "memory_active_gib" in shared:  # torchtitan's names
            points["memory/max_active(GiB)"] = shared["memory_active_gib"]
            points["memory/max_reserved(GiB)"] = shared["memory_gib"]
        self._scalars(lines[-1]["run_step"], points)
        self._pending.clear()
        self._pending_sums.clear()
        self._sync()
        self.restart_clock()
        return lines

    def _summed_by_source(self) -> list[dict[str, dict[str, float]]]:
        """The keys of each pending step's line with losses and tokens by source; one all-reduce for all steps."""
        sums = [None if of_step is None else of_step.sums_S2 for of_step in self._pending_sums]
        if given := [sums_S2 for sums_S2 in sums if sums_S2 is not None]:
            summed = iter(self._sum_over_ranks(torch.stack(given)).tolist())
        return [{} if each is None else by_source_keys(each.sources, next(summed)) for each in self._pending_sums]

    def restart_clock(self) -> None:
        """Restart the measurement of tokens/s, to exclude time spent on validation, saving or waiting."""
        self._since, self._tokens, self._flops = time.perf_counter(), 0, 0.0

    def validation(self, line: dict[str, Any], run_step: int) -> None:
        """Write a validation loss; also to TensorBoard, unless it is a baseline measured again."""
        self._write({"kind": "validation", **line})
        if line.get("measured_again"):
            self._sync()
            return
        dataset, identity = line["dataset"], line.get("validation_id")
        if None not in (identity, self._identities.get(dataset)) and identity != self._identities[dataset]:
            self._scalars(run_step, {f"validation_changed/{dataset}": 1.0})
        self._identities[dataset] = identity
        points = {f"validation/{dataset}/{key}": line[key] for key in ("loss_nats_per_token", "bits_per_byte")}
        if line["forgetting_nats_per_token"] is not None:
            points[f"forgetting/{dataset}"] = line["forgetting_nats_per_token"]
        self._scalars(run_step, points)
        self._sync()

    def metric(self, line: dict[str, Any], run_step: int) -> None:
        """Write one value of a metric of another package."""
        self._write({"kind": "metric", **line, "run_step": run_step})
        self._scalars(run_step, {f"metric/{line['metric']}/{line['name']}": line["value"]})
        self._sync()

    def event(self, name: str, **fields: Any) -> None:
        """Write an event, such as start, transition, checkpoint, resume or stop, with the time."""
        self._write({"kind": "event", "name": name, "time": time.time(), **fields})
        self._sync()

    def close(self) -> None:
        """Write the remaining lines and close the files."""
        record, self._record = self._record, None
        if record is not None:
            try:
                self._write_out(record)
            finally:
                record.close()
        for events in (self._over_steps, self._over_tokens):
            if events is not None:
                events.close()

    def rewind(self, run_step: int) -> None:
        """Continue after this step of the run, as after a rollback: TensorBoard hides the points of later steps."""
        for events in (self._over_steps, self._over_tokens):
            if events is not None:
                events.rewind(run_step)

    def show_config(self, toml: str) -> None:
        """Add the config to TensorBoard's texts, with the next point."""
        if self._over_steps is not None:
            self._over_steps.config = toml

    def _write(self, line: dict[str, Any]) -> None:
        if self._record is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            self._unwritten += (json.dumps(finite) + "\n").encode()

    def _sync(self) -> None:
        """Write to the disk; if it is full, the lines wait in memory and training continues."""
        try:
            self.fsync()
        except OSError as error:
            self.trouble = (
                f"{METRICS_FILE} cannot be written: {error.strerror}; {len(self._unwritten)} bytes wait in memory"
            )

    def fsync(self) -> None:
        """Write all lines to the disk before returning: no checkpoint is newer than the metrics on the disk.

        Raises:
            OSError: a write failed; the lines stay in memory, and the next call tries again.
        """
        if self._record is not None:
            self._write_out(self._record)
            self.trouble = ""

    def _write_out(self, record: FileIO) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[record.write(self._unwritten) :]
        os.fsync(record.fileno())

    def _scalars(self, run_step: int, points: dict[str, float]) -> None:
        over_tokens = {
            f"{group}_over_tokens/{rest}": value
            for tag, value in points.items()
            for group, _, rest in [tag.partition("/")]
            if group in _OVER_TOKENS
        }
        try:
            if self._over_steps is not None:
                self._over_steps.add(points, run_step)
            if self._over_tokens is not None and over_tokens:
                self._over_tokens.add(over_tokens, run_step)
        except OSError as error:  # its writer thread found the disk full; metrics.jsonl continues without the curves
            self._over_steps = self._over_tokens = None
            self.event("tensorboard_lost", why=str(error))


def versions(device: torch.device) -> dict[str, str]:
    """Versions of titan_cpt, torch and Python, and the name of the device."""
    return {
        "titan_cpt": own_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "on": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


def peak_memory() -> dict[str, float]:
    """Peak memory of this process so far in GiB.

    Returns:
        memory_gib: on CUDA the memory that torch's allocator has reserved, otherwise resident memory.
        memory_active_gib: on CUDA only: the memory in use by tensors, without what the allocator keeps for later ones.
    """
    if torch.cuda.is_available():
        active = torch.cuda.memory_stats().get("active_bytes.all.peak", 0)
        return {"memory_gib": torch.cuda.max_memory_reserved() / 2**30, "memory_active_gib": active / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def peak_flops(device: torch.device) -> float:
    """Dense bfloat16 peak of one device, FLOP/s, from its data sheet; NaN for a CPU or a GPU without an entry.

    A CPU's peak is unknown: measured matrix products differ by a factor of two from one second to the next.
    """
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else math.nan
