"""When, where and for how long a run was trained, and what interrupted it: from the events of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from titan_cpt.reporting.run_log import RunLog
from titan_cpt.reporting.summary import summarize_log

_CPUS = ("x86_64", "aarch64", "arm64", "AMD64", "ppc64le")  # platform.machine(), which is logged for a CPU


@dataclass(frozen=True)
class RunSessions:
    """The sessions of a run: each begins with a start of `titan-cpt train`.

    Attributes:
        started, last: Unix time of the first and the last event; None if no event has a time.
        wall_s: seconds of all sessions up to the last event of each, and of the last one up to its last recorded step,
            which counts if the run was killed; at least those of the recorded steps.
        device_s: the same, each session multiplied by its number of ranks.
        hardware: ranks and device of the sessions, such as `8 x NVIDIA H100 80GB HBM3`; one for each different one.
        on_cpu: all sessions ran on CPUs, whose peak FLOP/s, and so the MFU, is unknown.
        ranks: number of ranks of the last session; None if unknown or if the sessions differ.
        restarts: resumes from a checkpoint at the start of a session.
        rollbacks: returns to a checkpoint after a step that was not finite or a loss spike.
        skipped: batches that training skips. spikes: steps with a loss spike that was only logged.
        stops: times that a signal or a bad step stopped the run. failed_saves: checkpoints that could not be written.
    """

    started: float | None
    last: float | None
    wall_s: float
    device_s: float
    hardware: Sequence[str]
    on_cpu: bool
    ranks: int | None
    restarts: int
    rollbacks: int
    skipped: int
    spikes: int
    stops: int
    failed_saves: int


def sessions_of(run: RunLog) -> RunSessions:
    """The sessions of a run."""
    recorded_s = sum(stage["seconds"] for stage in summarize_log(run)["stages"])
    timed = [float(event["time"]) for event in run.events if isinstance(event.get("time"), int | float)]
    names = [event["name"] for event in run.events]
    rollbacks = sum(names[i - 1] == "skip_batch" and names[i] in ("resume", "transition") for i in range(1, len(names)))
    wall = device = 0.0
    hardware: list[str] = []
    ranks: set[int] = set()
    sessions = _split(run.events)
    for session in sessions:
        start = session[0]
        times = [float(event["time"]) for event in session if isinstance(event.get("time"), int | float)]
        world_size = start.get("world_size")
        if len(session) > 1 + sum(event["name"] == "skip" for event in session):  # more than stages already trained
            seconds = max(times) - min(times) if times else 0.0
            if session is sessions[-1]:
                seconds = max(seconds, _until_last_step(run, session))
            wall += seconds
            device += seconds * (world_size if isinstance(world_size, int) else 1)
        text = _hardware(start)
        if text and text not in hardware:
            hardware.append(text)
        if isinstance(world_size, int):
            ranks.add(world_size)
    return RunSessions(
        started=min(timed, default=None),
        last=max(timed, default=None),
        wall_s=max(wall, recorded_s),
        device_s=max(device, recorded_s * min(ranks, default=1)),
        hardware=hardware,
        on_cpu=bool(hardware) and all(text.endswith(_CPUS) for text in hardware),
        ranks=ranks.pop() if len(ranks) == 1 else None,
        restarts=sum(name == "resume" for name in names) - sum(_rolled_back_by_resume(names)),
        rollbacks=rollbacks,
        skipped=names.count("skip_batch"),
        spikes=names.count("loss_spike"),
        stops=names.count("stop"),
        failed_saves=names.count("save_failed"),
    )


def _rolled_back_by_resume(names: Sequence[str]) -> list[bool]:
    return [names[i - 1] == "skip_batch" and names[i] == "resume" for i in range(1, len(names))]


def _until_last_step(run: RunLog, session: Sequence[Mapping[str, Any]]) -> float:
    """Seconds from the start of the last session to its last recorded step: up to the event before it, then by speed.

    Steps have no time of day, but tokens per second; time of validations and checkpoints between them is missing.
    """
    placed = [event for event in session if "stage" in event and isinstance(event.get("step"), int)]
    if not placed or not all(isinstance(event.get("time"), int | float) for event in (session[0], placed[-1])):
        return 0.0
    begin = run.tokens_at(placed[-1]["stage"], placed[-1]["step"])
    seconds = 0.0
    for line in run.trains:
        if run.tokens_at(line["stage"], line["step"]) > begin:
            seconds += run.seconds_of(line)
    return float(placed[-1]["time"] - session[0]["time"]) + seconds


def _split(events: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The events of each session; those before the first start belong to none."""
    sessions: list[list[Mapping[str, Any]]] = []
    for event in events:
        if event["name"] == "start":
            sessions.append([event])
        elif sessions:
            sessions[-1].append(event)
    return sessions


def _hardware(start: Mapping[str, Any]) -> str:
    versions = start.get("versions")
    device = versions.get("on") if isinstance(versions, dict) else None
    if not isinstance(device, str):
        return ""
    return f"{start.get('world_size', 1)} x {device}"
