"""Sections of the HTML report about the runs: times, hardware, interruptions, data, speed, checkpoints, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from titan_cpt.common.run_folder import CONFIG_FILE, checkpoint_folders
from titan_cpt.reporting.html_parts import HtmlTable, Link, Section
from titan_cpt.reporting.number_texts import count_text, date_text, duration_text, token_text
from titan_cpt.reporting.run_log import RunLog
from titan_cpt.reporting.sessions import sessions_of
from titan_cpt.reporting.summary import summarize_log

_EVENTS_SHOWN = 200
_UNEVENTFUL = ("start", "skip", "transition", "checkpoint", "anneal")


def data_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Tokens, replay and epochs of each dataset in each stage."""
    rows = []
    for run in runs:
        progress = {stage["name"]: _progress(stage) for stage in summarize_log(run)["stages"]}
        for stage in run.plan["stages"]:
            for name, use in stage["datasets"].items():
                share = use["replayed_tokens"] / stage["tokens"]
                epochs = "unknown" if use["epochs"] is None else f"{use['epochs']:.2f}"
                replay = f"{token_text(use['replayed_tokens'])} ({share:.1%})" if use["replayed_tokens"] else ""
                rows.append(
                    [run.name, stage["name"], name, token_text(use["tokens"]), replay, epochs, progress[stage["name"]]]
                )
    if rows:
        yield Section(
            "Data",
            "Planned tokens of each stage by dataset. Replay: tokens of a dataset of earlier stages, in percent of the "
            "stage. Epochs: how often the stage repeats the dataset. Trained: how much of the stage is done.",
            tables=[HtmlTable(["run", "stage", "dataset", "tokens", "replay", "epochs", "trained"], rows)],
        )


def sessions_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Dates, duration, hardware and interruptions of each run, and its events out of the ordinary."""
    head = ["run", "started (UTC)", "last event (UTC)", "wall-clock", "device hours", "hardware"]
    head += ["restarts", "rollbacks", "skipped batches", "loss spikes", "stops", "failed saves"]
    rows = []
    details = []
    for run in runs:
        seen = sessions_of(run)
        counts = (seen.restarts, seen.rollbacks, seen.skipped, seen.spikes, seen.stops, seen.failed_saves)
        hours = f"{seen.device_s / 3600:.3g}" if seen.device_s else ""
        wall = duration_text(seen.wall_s) if seen.wall_s else ""
        times = [date_text(seen.started), date_text(seen.last), wall, hours]
        rows.append([run.name, *times, ", then ".join(seen.hardware), *map(count_text, counts)])
        events = [event for event in run.events if event["name"] not in _UNEVENTFUL]
        if events:
            more = f"{len(events) - _EVENTS_SHOWN:,} earlier ones are in metrics.jsonl\n"
            lines = "".join(_event_line(event) for event in events[-_EVENTS_SHOWN:])
            details.append(
                (
                    f"{run.name}: {len(events):,} event{'s' if len(events) > 1 else ''}",
                    (more if len(events) > _EVENTS_SHOWN else "") + lines,
                )
            )
    if any(cell for row in rows for cell in row[1:]):
        yield Section(
            "Time, hardware, interruptions",
            "Wall-clock is the time of all sessions from their start to their last event (of a run that was killed: to "
            "its last recorded step); device hours are the same "
            "multiplied by the number of ranks. An interruption that did not occur in any run has no column.",
            tables=[HtmlTable(head, rows).without_empty_columns()],
            details=details,
        )


def _event_line(event: Mapping[str, Any]) -> str:
    time = event.get("time")
    rest = ", ".join(
        f"{key} {value}" for key, value in event.items() if key not in ("kind", "name", "time") and value is not None
    )
    return f"{date_text(time if isinstance(time, int | float) else None):<16}  {event['name']:<20} {rest}"[:300] + "\n"


def throughput_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Tokens per second, model FLOPs utilization and memory."""
    if any(line.get("tokens_per_s") for run in runs for line in run.trains):
        from titan_cpt.reporting.curve_sections import throughput_figure

        head = ["run", "recorded steps", "seconds of these steps", "tokens per second", "tokens per second and device"]
        head += ["MFU", "memory of rank 0, GiB"]
        table = HtmlTable(head, [_throughput_row(run) for run in runs]).without_empty_columns()
        yield Section("Throughput", figures=[throughput_figure(runs)], tables=[table])


def _throughput_row(run: RunLog) -> list[str]:
    stages = summarize_log(run)["stages"]
    keys = ("seconds", "timed_steps", "timed_tokens", "steps_done")
    seconds, timed, tokens, done = (sum(stage[key] for stage in stages) for key in keys)
    seen = sessions_of(run)
    ranks = seen.ranks
    mfus = [] if seen.on_cpu else [line["mfu"] for line in run.trains if line.get("mfu")]
    memory = max((line["memory_gib"] for line in run.trains if line.get("memory_gib")), default=None)
    return [
        run.name,
        f"{timed:,} of {done:,}",
        f"{seconds:,.0f}",
        f"{tokens / seconds:,.0f}" if seconds else "",
        f"{tokens / seconds / ranks:,.0f}" if seconds and ranks else "",
        f"{sum(mfus) / len(mfus):.1%}" if mfus else "",
        "" if memory is None else f"{memory:.2f}",
    ]


def checkpoints_section(runs: Sequence[RunLog]) -> Iterator[Section]:
    """Links to the newest checkpoint of each stage, if it is still there."""
    rows: list[list[str | Link]] = []
    for run in runs:
        for stage in run.plan["stages"]:
            folders = checkpoint_folders(run.folder, stage["name"])
            if folders:
                newest = folders[-1]
                rows.append([run.name, stage["name"], str(len(folders)), Link(newest.name, newest)])
    if rows:
        table = HtmlTable(["run", "stage", "checkpoints", "newest"], rows)
        yield Section("Checkpoints", "The links open the folders on this computer.", tables=[table])


def provenance_section(runs: Sequence[RunLog]) -> Section:
    """Plan fingerprint, package versions, data fingerprints and resolved config of each run."""
    rows = []
    details = []
    for run in runs:
        start: Mapping[str, Any] = next((event for event in reversed(run.events) if event["name"] == "start"), {})
        versions = ", ".join(f"{name} {value}" for name, value in start.get("versions", {}).items())
        rows.append([run.name, str(run.plan["fingerprint"]), str(start.get("world_size", "")), versions])
        data = "".join(f"{name:<40} {value}\n" for name, value in start.get("data", {}).items())
        if data:
            details.append((f"{run.name}: fingerprints of the data", data))
        config = run.folder / CONFIG_FILE
        if config.exists():
            text = config.read_text(encoding="utf-8", errors="replace")
            details.append((f"{run.name}: config with all defaults", text))
    return Section("Reproduction", tables=[HtmlTable(["run", "plan", "ranks", "versions"], rows)], details=details)


def _progress(stage: Mapping[str, Any]) -> str:
    """How much of a stage is trained."""
    if not stage["is_begun"]:
        return "not begun"
    done = stage["steps_done"]
    return "all" if done >= stage["steps"] else f"{done:,} of {stage['steps']:,} steps"
