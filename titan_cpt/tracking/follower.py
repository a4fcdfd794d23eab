"""The process that sends a training run to one tracker: `python -m titan_cpt.tracking.follower RUN TRACKER`.

Rank 0 starts it (follower_process.py). It follows metrics.jsonl until its standard input is closed or receives a line,
which is when training ends in any way. Whatever a client does here (raise, hang, use memory, end the process), training
continues. It writes lines for the user to its standard output, which the trainer prints; all else goes to
trackers/NAME.log.
"""

from __future__ import annotations

import argparse
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from titan_cpt.common.file_lock import FileLock
from titan_cpt.common.run_folder import CONFIG_FILE, TRACKERS_FOLDER
from titan_cpt.config.load import load_run
from titan_cpt.tracking.position import NOTE, lock_file, log_file
from titan_cpt.tracking.run_info import last_start
from titan_cpt.tracking.sender import Sender, without_secrets

_POLL_S = 1.0
_LOCK_POLL_S = 0.2
_LONGEST_PAUSE_S = 60.0
_NICENESS = 10


class Training:
    """Whether the trainer still runs: it holds the other end of standard input open.

    A thread watches it, because a client can block for long. Once training has ended, this process has
    `timeout_s` left.
    """

    def __init__(self, timeout_s: float) -> None:
        self._ended = threading.Event()
        self._timeout_s = timeout_s
        threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether training has ended."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait until training ends or the time is over; True if it has ended."""
        return self._ended.wait(seconds)

    def _watch(self, parent: int) -> None:
        while not select.select([sys.stdin], [], [], _POLL_S)[0] and os.getppid() == parent:
            pass
        self._ended.set()
        signal.alarm(math.ceil(self._timeout_s) + 1)  # its default action ends the process


def follow(
    run: Path,
    name: str,
    training: Training,
    tell: Callable[[str], None],
    *,
    after: int | None,
    overrides: Sequence[tuple[str, str]] = (),
) -> bool:
    """Send the run's metrics until training ends; whether the tracker has everything.

    Args:
        tell: receives where the run is found, and the first of several failures.
        after: size of metrics.jsonl when training began: this session's `start` event comes later. None if this
            process did not begin with the training.
    """
    config = load_run(run / CONFIG_FILE, overrides)
    (run / TRACKERS_FOLDER).mkdir(exist_ok=True)
    lock = FileLock(lock_file(run, name), warn=_log)
    while not lock.acquire():  # the process of a killed session is still sending, within its time limit
        time.sleep(_LOCK_POLL_S)
    while after is not None and not last_start(run, after) and not training.wait(0.1):
        pass
    pause_s = _POLL_S
    shown = ""
    while True:
        last_attempt = training.ended
        try:
            sender = Sender(run, name, config.metrics, live=after is not None)
            where = sender.begin()
            if shown != where:
                tell(f"{name}: {where}")
                shown = where
            while True:
                ended = training.wait(_POLL_S)
                sender.catch_up()
                pause_s = _POLL_S
                if ended:
                    sender.finish()
                    return True
        except (Exception, SystemExit) as error:  # clients raise anything, and one of them exits
            reason = without_secrets(f"{type(error).__name__}: {error}")
            _log(reason)
            if shown != "failed":
                log = log_file(run, name)
                tell(f"{NOTE}{name} does not receive the metrics ({reason[:200]}); training continues, see {log}")
                shown = "failed"
        if last_attempt:
            return False
        training.wait(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _log(message: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), message, file=sys.stderr, flush=True)


def main() -> int:
    """Follow the run; the exit status is 0 if the tracker has everything, else 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("tracker")
    parser.add_argument("--after", type=int)
    parser.add_argument("--override", nargs=2, action="append", default=[])
    parser.add_argument("--timeout", type=float, default=30.0)
    options = parser.parse_args()
    os.nice(_NICENESS)
    to_trainer = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # clients print

    def tell(line: str) -> None:
        with suppress(OSError):  # the trainer was killed
            print(line, file=to_trainer, flush=True)

    overrides = [(key, value) for key, value in options.override]
    training = Training(options.timeout)
    done = follow(options.run, options.tracker, training, tell, after=options.after, overrides=overrides)
    return 0 if done else 1


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # threads of a client cannot delay the end
