"""Sorts the device's work in a trace of torch.profiler by kind: products, attention, optimizer, casts, gaps. No torch.

A kernel belongs to the phase of the step in which the host launched it (backward runs in another thread, while the main
thread waits within the phase), and to the operator that launched it. Without a device, in a dry run, the operators of
the CPU take the place of kernels.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

STEP, OPTIMIZER = "step", "optimizer"
PHASE_NAMES = (STEP, OPTIMIZER, "clip", "head", "master weights", "backward")
PRODUCT = r"gemm|cutlass|nvjet|xmma|cublas|split_?k|triton_tem|aten::(mm|addmm|bmm|linear|_scaled_mm)\b|mkldnn|\bmm\b"
ATTENTION = r"attention|flash|fmha|sdpa|mha_|cudnn.*(prop|attn)|prefill"
BACKWARD = r"cutlassB|bprop|backward|bwd|_dq|_dk|dgrad"
# (kind, phases in which it applies or (), pattern of the kernel's or operator's name); the first that fits counts
KINDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("attention backward", (), rf"(?=.*({ATTENTION}))(?=.*({BACKWARD}))"),
    ("attention forward", (), ATTENTION),
    ("products", (), PRODUCT),
    ("optimizer", (OPTIMIZER,), ""),
    ("optimizer", (), "adam"),
    ("clip: norm", ("clip",), "norm|reduce|stack|linalg"),
    ("clip: scaling", ("clip",), ""),
    ("cast of the master weights", ("master weights",), ""),
    ("head: softmax", ("head",), "softmax|exp|logsumexp|amax|log|gather|scatter"),
    ("head: adding gradients", ("head",), "add"),
    ("head: other", ("head",), ""),
    ("casts of gradients", ("backward",), "_to_copy|copy_|CopyFunctor|copy_kernel|direct_copy|convert"),
    ("norms", (), "layer_?norm|rms_?norm|rsqrt|native_layer"),
    ("GELU, SiLU", (), "gelu|silu|(?<![a-z])erf|sigmoid|swiglu"),
    ("embedding", (), "embedding|index_put|indexing_backward"),
    ("copies between dtypes", (), "_to_copy|copy_|CopyFunctor|copy_kernel|direct_copy|convert"),
    ("sums", (), "sum|reduce"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the device: names, phase of its launch, microseconds."""

    name: str
    operator: str
    phase: str
    category: str
    begin_us: float
    duration_us: float

    @property
    def kind(self) -> str:
        """The row of the table it belongs to."""
        if self.category == "gpu_memset" or "Memset" in self.name or self.operator in ("aten::zero_", "aten::fill_"):
            return "memset"
        if self.category == "gpu_memcpy":
            return "copies"
        text = f"{self.operator} {self.name}"
        for kind, phases, pattern in KINDS:
            if (not phases or self.phase in phases) and re.search(pattern, text, re.IGNORECASE):
                return kind
        return "other elementwise"


@dataclass(frozen=True)
class Span:
    """A range of host time with a name; `thread` is 0 where the thread does not matter."""

    begin_us: float
    end_us: float
    name: str
    thread: int = 0


class Innermost:
    """Finds the shortest span that contains a moment; spans of one thread nest."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._by_thread: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            self._by_thread[span.thread].append(span)
        for spans_of_thread in self._by_thread.values():
            spans_of_thread.sort(key=lambda span: span.begin_us)
        self._begins = {thread: [span.begin_us for span in spans] for thread, spans in self._by_thread.items()}

    def at(self, moment_us: float, thread: int = 0) -> str:
        """Its name; "" if there is none."""
        spans = self._by_thread.get(thread, [])
        last = bisect.bisect_right(self._begins.get(thread, []), moment_us)
        for span in reversed(spans[max(0, last - 2000) : last]):  # the first that has not ended is the innermost
            if span.end_us >= moment_us:
                return span.name
        return ""


def kernels_of(trace: dict[str, Any]) -> list[Kernel]:
    """The device's work from the mark `STEP` on, in a Chrome trace of torch.profiler.

    The device idles at the beginning of the mark. Without a device, the operators of the CPU and their own time.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    marks = [event for event in events if event.get("cat") == "user_annotation"]
    since = next(event["ts"] for event in marks if event["name"] == STEP)
    events = [event for event in events if event["ts"] >= since]
    phases = Innermost(_span(event, 0) for event in marks if event["name"] in PHASE_NAMES)
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    by_thread = Innermost(_span(event, event["tid"]) for event in operators)
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not on_device:
        return [
            Kernel(event["name"], event["name"], phases.at(event["ts"]), "cpu_op", event["ts"], max(0.0, own_us))
            for event, own_us in _with_own_time(operators)
        ]
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    found = []
    for event in on_device:
        launch = launches.get(event.get("args", {}).get("correlation"))
        phase = phases.at(launch["ts"]) if launch else ""
        operator = by_thread.at(launch["ts"], launch["tid"]) if launch else ""
        found.append(Kernel(event["name"], operator, phase, event["cat"], event["ts"], event["dur"]))
    return found


def table_of(kernels: list[Kernel], *, wall_us: float, steps: int) -> dict[str, Any]:
    """Milliseconds and launches per step by kind, largest first; wall time, busy time, and launches."""
    times: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for kernel in kernels:
        times[kernel.kind] += kernel.duration_us / 1e3 / steps
        launches[kernel.kind] += 1
    busy = _union_us((kernel.begin_us, kernel.begin_us + kernel.duration_us) for kernel in kernels) / 1e3 / steps
    wall = wall_us / 1e3 / steps
    order = sorted(times, key=lambda kind: -times[kind])
    return {
        "wall_ms": wall,
        "busy_ms": busy,
        "gaps_ms": wall - busy,
        "launches": sum(count for kind, count in launches.items() if kind not in ("memset", "copies")) / steps,
        "kinds": {kind: {"ms": times[kind], "launches": launches[kind] / steps} for kind in order},
    }


def unknown_of(kernels: list[Kernel], steps: int, number: int = 12) -> list[tuple[str, float]]:
    """The kernels with the most time of "other elementwise", for extending `KINDS`: names and ms per step."""
    times: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        if kernel.kind == "other elementwise":
            times[f"{kernel.phase}: {kernel.operator}: {kernel.name[:100]}"] += kernel.duration_us / 1e3 / steps
    return sorted(times.items(), key=lambda item: -item[1])[:number]


def _span(event: dict[str, Any], thread: int) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"], event["name"], thread)


def _with_own_time(operators: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each operator, and its microseconds outside of the operators that it calls."""
    by_thread: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in operators:
        by_thread[event["tid"]].append(event)
    for events in by_thread.values():
        own = [event["dur"] for event in events]
        callers: list[int] = []
        for number in sorted(range(len(events)), key=lambda n: (events[n]["ts"], -events[n]["dur"])):
            event = events[number]
            while callers and events[callers[-1]]["ts"] + events[callers[-1]]["dur"] <= event["ts"]:
                callers.pop()
            if callers:
                own[callers[-1]] -= event["dur"]
            callers.append(number)
        yield from zip(events, own, strict=True)


def _union_us(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels on two streams overlap."""
    total, end = 0.0, -1.0
    for begin, finish in sorted(intervals):
        total += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return total
