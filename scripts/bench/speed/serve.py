"""The side of a trainer's process: load on request, report the first step, then take N steps for every line "N".

Requests are lines on standard input, answers are lines of JSON on the original standard output. The process imports its
libraries at once and waits for the line "load" before it takes memory, so that the processes of a race can import side
by side. On CUDA the clock starts and stops when the device has finished, the peak is that of the device's memory, and
memory that the next step can allocate again returns to the device after every turn.
"""

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
GIB = 2**30


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


def wait_for_load() -> None:
    """Wait for the line "load"; end the process if the driver closes the pipe instead."""
    if sys.stdin.readline().strip() != "load":
        sys.exit()


def decline(status: str, reason: str) -> None:
    """Tell the driver why this trainer takes no step, in one line, and end the process."""
    say(status=status, reason=" ".join(reason.split())[:300])
    _out.close()
    os._exit(0)  # a library's threads must not keep the process


def serve(step: Callable[[int], Any], device: str) -> None:
    """For every line "N" take N steps and answer with their seconds and losses.

    Args:
        step: step(i) takes the i-th step and returns a scalar loss.
        device: "cpu" or "cuda". On CUDA every turn begins with one step that is not timed, which allocates what the
            previous turn returned to the device.
    """
    import torch

    begin = time.perf_counter()
    try:
        first_loss = float(step(0))
    except torch.OutOfMemoryError as error:
        return decline("out of memory", str(error).splitlines()[0])
    versions = {"torch": torch.__version__, **memory(device)}
    say(first_loss=first_loss, first_step_s=time.perf_counter() - begin, **versions, **release(device))
    done = 1
    for line in sys.stdin:
        count, losses = int(line), []
        gc.collect()
        if device == "cuda":
            step(done)
            done += 1
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            losses.append(step(done))
            done += 1
        if device == "cuda":
            torch.cuda.synchronize()
        seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
        figures = {"seconds": seconds, "cpu_s": cpu_s, "losses": [float(loss) for loss in losses], **memory(device)}
        losses.clear()
        say(**figures, **release(device))
    return None


def memory(device: str) -> dict[str, float]:
    """Peak memory in GiB: of the device since the last reset (allocated, reserved), or resident on a CPU."""
    if device != "cuda":
        return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    import torch

    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


def release(device: str) -> dict[str, float]:
    """Return unused cached memory to the device; what this process keeps, and what the device has left, in GiB."""
    if device != "cuda":
        return {}
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return {"kept_gib": torch.cuda.memory_reserved() / GIB, "free_gib": torch.cuda.mem_get_info()[0] / GIB}
