"""How a command ends: its last message and its exit status, also where torchrun stands between it and the user."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

STOPPED_EARLY = 75  # a signal stopped the run after its checkpoint was saved; the same command resumes it
STATUS_FILE_VARIABLE = "TITAN_CPT_STATUS_FILE"  # torchrun makes every failure a 1; run_train.sh reads the true one here


def tell(message: str, *, silent: bool = False) -> None:
    """Print a message, and keep it for run_train.sh, which then knows what a process that is not shown had to say."""
    if not silent:
        print(message, file=sys.stderr)
    if path := os.environ.get(STATUS_FILE_VARIABLE):
        kept = Path(f"{path}.process-{os.environ.get('LOCAL_RANK', '0')}")
        with suppress(OSError):
            kept.write_text("" if silent else f"{message}\n", encoding="utf-8")


def leave(status: int) -> NoReturn:
    """Exit, with the status written where run_train.sh looks for it."""
    path = os.environ.get(STATUS_FILE_VARIABLE)
    # A rank that fails makes torchrun stop the others, which then leave with a status of their own: the mistake counts.
    if path and status and not (Path(path).exists() and Path(path).read_text(encoding="utf-8") == "2"):
        Path(path).write_text(str(status), encoding="utf-8")
    sys.exit(status)


def leave_interrupted(told: str) -> NoReturn:
    """End as Ctrl-C ends a program (130 in a shell, whose loops end too), with a line in place of a traceback."""
    print(f"stopped by Ctrl-C{': ' if told else ''}{told}", file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGINT)
    sys.exit(130)
