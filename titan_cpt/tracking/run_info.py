"""What a tracker shows of a run besides its metrics: name, config, model, versions, final losses, how it ended."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from titan_cpt.common.run_folder import CONFIG_FILE, METRICS_FILE, PLAN_FILE, SUMMARY_FILE
from titan_cpt.config.toml_files import parse_toml
from titan_cpt.tracking.rows import read_json

State = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class RunInfo:
    """A run as a tracker describes it.

    Attributes:
        folder: the run's folder.
        name: job.name.
        config: the resolved config, nested, with stages by name; also `plan`, `versions`, `world_size`, `git_commit`.
        git_commit: commit of the working directory; "" if unknown.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    git_commit: str


def read_run_info(run: Path, *, live: bool) -> RunInfo:
    """Read a run's description from its folder.

    Args:
        live: the run is training now, so that the commit of the working directory is the run's commit.
    """
    config: dict[str, Any] = parse_toml((run / CONFIG_FILE).read_text(encoding="utf-8"))
    config["stages"] = {stage["name"]: stage for stage in config.get("stages", ())}
    plan = read_json(run / PLAN_FILE)
    model = plan.get("model", {})
    config["plan"] = {
        "fingerprint": plan.get("fingerprint"),
        "parameters": model.get("parameters"),
        "parameters_without_embeddings": model.get("parameters_without_embeddings"),
        "step_tokens": plan.get("step_tokens"),
        "total_tokens": plan.get("total_tokens"),
    }
    start = last_start(run)
    config["versions"] = dict(start.get("versions", {}))
    config["world_size"] = start.get("world_size")
    commit = _git_commit() if live else ""
    if commit:
        config["git_commit"] = commit
    return RunInfo(run, config["job"]["name"], config, commit)


def last_start(run: Path, after: int = 0) -> dict[str, Any]:
    """The last `start` event at or after a byte of metrics.jsonl; empty if there is none."""
    found: dict[str, Any] = {}
    try:
        with (run / METRICS_FILE).open("rb") as file:
            file.seek(after)
            for line in file:
                if b'"name": "start"' in line and line.endswith(b"\n"):
                    found = json.loads(line)
    except (OSError, ValueError, RecursionError):
        pass
    return found


def flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in nested tables that is not null."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        elif value is not None:
            yield before + str(key), value


def final_values(run: Path) -> dict[str, float]:
    """Losses after each stage from summary.json: `final/STAGE/DATASET/after`, `forgetting`, `adaptation`."""
    values = {}
    for stage in read_json(run / SUMMARY_FILE).get("stages", ()):
        for key in ("after", "forgetting", "adaptation"):
            for dataset, value in stage.get(key, {}).items():
                if isinstance(value, int | float):
                    values[f"final/{stage['name']}/{dataset}/{key}"] = float(value)
    return values


def end_state(run: Path) -> State:
    """Whether all stages are trained, or a signal stopped the run, or it ended otherwise."""
    stages = read_json(run / SUMMARY_FILE).get("stages", ())
    if stages and all(stage.get("is_done") for stage in stages):
        return "finished"
    try:
        with (run / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
    except OSError:
        return "failed"
    return "stopped" if b'"name": "stop"' in last and b'"signal"' in last else "failed"


def _git_commit() -> str:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
