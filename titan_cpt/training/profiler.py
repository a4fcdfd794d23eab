"""Traces of torch.profiler: one step in every so many, on every rank, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from titan_cpt.common.run_folder import PROFILE_FOLDER, step_name

_WARMUP_STEPS = 2  # the profiler's own first steps are slow; these are recorded and thrown away


class Profiler:
    """Records every `every_steps`-th step of this process into `<run>/profile/<stage>-step-<8 digits>/`.

    What is recorded is all that happens between two calls of `step`: the optimizer step, and validation or a save
    where one falls there.

    Args:
        run: the run's folder.
        every_steps: steps from one trace to the next; None records nothing.
        rank: names this process's file, `rank-<5 digits>.json.gz`.
        on_failed: told why a trace could not be written; training goes on.
    """

    def __init__(self, run: Path, *, every_steps: int | None, rank: int, on_failed: Callable[[str], None]) -> None:
        self._run, self._rank, self._on_failed = run, rank, on_failed
        self._of = ""
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
        """Say that a step of the stage has ended."""
        if self._profile is not None:
            self._of = f"{stage}-{step_name(steps_done)}"
            self._profile.step()

    def close(self) -> None:
        """Stop recording; a step half recorded is given up."""
        if self._profile is not None:
            self._profile.on_trace_ready = lambda _: None
            self._profile.stop()
            self._profile = None

    def _write(self, recorded: profile) -> None:
        path = self._run / PROFILE_FOLDER / self._of / f"rank-{self._rank:05d}.json.gz"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
        except OSError as error:
            self._on_failed(f"  {path}: the trace cannot be written: {error.strerror or error}; training goes on")
