"""The side of a trainer's process: report the first step, then take N steps for every line "N" on standard input."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

_out = os.fdopen(os.dup(1), "w")  # keeps the output of libraries out of the answers
os.dup2(2, 1)


def arguments() -> dict[str, Any]:
    """The options of the driver: one JSON object. Applies the allocator setting if they request it."""
    wanted: dict[str, Any] = json.loads(sys.argv[1])
    if wanted.get("allocator"):
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
            mallopt(name, value)
    return wanted


def say(**fields: Any) -> None:
    """Send one line to the driver."""
    _out.write(json.dumps(fields) + "\n")
    _out.flush()


def serve(step: Callable[[int], Any]) -> None:
    """For every line "N" take N steps and answer with their seconds and losses. `step(i)` returns a scalar loss."""
    done, begin = 0, time.perf_counter()
    say(first_loss=float(step(done)), first_step_s=time.perf_counter() - begin)
    done = 1
    for line in sys.stdin:
        count, losses = int(line), []
        gc.collect()
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            losses.append(step(done))
            done += 1
        seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        say(seconds=seconds, cpu_s=cpu_s, losses=[float(loss) for loss in losses], peak_gib=peak)
