"""torch.profiler traces: one step in every N, on every rank, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from titan_cpt.common.run_folder import PROFILE_FOLDER, step_name

_WARMUP_STEPS = 2  # torch's profiler slows down its first steps; it discards these


class Profiler:
    """Records every `every_steps`-th step of this process into `<run>/profile/<stage>-step-<8 digits>/`.

    A trace has everything between two calls of `step`: the optimizer step, and validation or a save if one is due.

    Args:
        run: the run's folder.
        every_steps: steps from one trace to the next; None disables the profiler.
        rank: this process's rank, in the file name `rank-<5 digits>.json.gz`.
        on_failed: called with a message if a trace cannot be written; training continues.
    """

    def __init__(self, run: Path, *, every_steps: int | None, rank: int, on_failed: Callable[[str], None]) -> None:
        self._run = run
        self._rank = rank
        self._on_failed = on_failed
        self._trace_name = ""
        self._profile: profile | None = None
        if every_steps is not None:
            warmup = min(_WARMUP_STEPS, every_steps - 1)
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities,
                schedule=schedule(wait=every_steps - warmup - 1, warmup=warmup, active=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profile.start()

    def step(self, stage: str, steps_done: int) -> None:
        """Mark the end of a step."""
        if self._profile is not None:
            self._trace_name = f"{stage}-{step_name(steps_done)}"
            self._profile.step()

    def close(self) -> None:
        """Stop recording; an unfinished trace is discarded."""
        if self._profile is not None:
            self._profile.on_trace_ready = lambda _: None
            self._profile.stop()
            self._profile = None

    def _write(self, recorded: profile) -> None:
        path = self._run / PROFILE_FOLDER / self._trace_name / f"rank-{self._rank:05d}.json.gz"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
        except OSError as error:
            self._on_failed(f"  {path}: the trace cannot be written: {error.strerror or error}; training continues")
