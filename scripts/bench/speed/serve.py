"""One contestant in a process of its own: it says when it is ready, then takes steps whenever it is told to."""

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

_out = os.fdopen(os.dup(1), "w")  # what libraries print must not come between our lines
os.dup2(2, 1)


def arguments() -> dict[str, Any]:
    """What the driver wants: one JSON object."""
    wanted: dict[str, Any] = json.loads(sys.argv[1])
    if wanted.get("allocator"):
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
            mallopt(name, value)
    return wanted


def say(**fields: Any) -> None:
    """A line to the driver."""
    _out.write(json.dumps(fields) + "\n")
    _out.flush()


def serve(step: Callable[[int], Any]) -> None:
    """Answer "N" by taking N steps: their seconds and the loss of each. `step` returns a loss that can be a float."""
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
