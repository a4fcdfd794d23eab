"""The state of a run, from its folder: running, finished, stopped, failed or planned; and why."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_cpt.common.file_lock import lock_state
from titan_cpt.common.run_folder import LOCK_FILE, MANIFEST_FILE, checkpoint_folder, log_path

RUNNING, FINISHED, STOPPED, FAILED, PLANNED = "running", "finished", "stopped", "failed", "planned"
_FRESH_S = 900  # without file locks: a run that has written within this time, and has a holder, is running
_KILLED = "ended without a record: killed or crashed"
_LOG_END_BYTES = 1 << 14
_TRAINING_EVENTS = (  # others, such as those of uploads, may follow the event that ends a session
    *(
        "start",
        "skip",
        "transition",
        "warm_up",
        "resume",
        "anneal",
        "checkpoint",
        "save_failed",
        "evaluation",
        "skip_batch",
        "stop",
    ),
)
_ERROR = re.compile(r"[A-Za-z_.]*(Error|Exception|Interrupt)\b.*")


def run_state(
    run: Path,
    steps: Mapping[str, int],
    events: Sequence[Mapping[str, Any]],
    *,
    is_begun: bool,
    last_write_s: float | None,
) -> tuple[str, str]:
    """State and reason; for a running run the process, its host and Slurm job.

    Args:
        steps: planned steps by stage.
        events: the last events of metrics.jsonl, oldest first.
        is_begun: whether anything was measured.
        last_write_s: Unix time at which the run was last written to.
    """
    held, holder = lock_state(run / LOCK_FILE)
    is_fresh = last_write_s is not None and time.time() - last_write_s < _FRESH_S
    if held or (held is None and holder and is_fresh):
        return RUNNING, holder
    last = next(reversed(list(steps)), "")
    if last and (checkpoint_folder(run, last, steps[last]) / MANIFEST_FILE).exists():
        return FINISHED, ""
    if not is_begun and not events:
        return PLANNED, ""
    of_training = [event for event in events if event.get("name") in _TRAINING_EVENTS]
    last_event = of_training[-1] if of_training else {}
    if last_event.get("name") == "stop" and "signal" in last_event:
        return STOPPED, f"by {last_event['signal']}"
    why = last_event.get("why") if last_event.get("name") in ("stop", "save_failed") else _last_error(run)
    return FAILED, str(why or _KILLED)


def _last_error(run: Path) -> str:
    """The error message in the last session of rank 0's log; "" if there is none."""
    try:
        with log_path(run, 0).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_END_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        if line.startswith("==="):
            return ""
        if _ERROR.fullmatch(line):
            return line
    return ""
