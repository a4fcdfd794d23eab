"""How far a tracker has received a run's metrics.jsonl: trackers/NAME.json in the run's folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titan_cpt.common.files import write_text_atomically
from titan_cpt.common.run_folder import TRACKERS_FOLDER
from titan_cpt.tracking.rows import read_json

NOTE = "note: "
"""Begins each message of a follower about what its tracker lacks."""


@dataclass
class Position:
    """The state of one tracker for one run.

    Attributes:
        run_name: name of the run's folder. A copy or a renamed folder begins a new run in the tracker.
        tracker_run: the id of the run in the tracker; "" before it exists.
        lines: number of lines of metrics.jsonl that the tracker has for certain.
        crc: CRC-32 of the last of them.
        final: the final values that were sent, as JSON.
        unfinished: what the tracker's client was writing and has not finished; "" for nothing.
    """

    run_name: str
    tracker_run: str = ""
    lines: int = 0
    crc: int = 0
    final: str = ""
    unfinished: str = ""

    def save(self, run: Path, tracker: str) -> None:
        """Write it; after a crash the file has the old or the new content."""
        write_text_atomically(position_file(run, tracker), json.dumps(asdict(self), indent=1))


def position_file(run: Path, tracker: str) -> Path:
    """The file of a tracker's position."""
    return run / TRACKERS_FOLDER / f"{tracker}.json"


def log_file(run: Path, tracker: str) -> Path:
    """The log of the process that sends a run to a tracker."""
    return run / TRACKERS_FOLDER / f"{tracker}.log"


def lock_file(run: Path, tracker: str) -> Path:
    """Held by the process that sends a run to a tracker."""
    return run / TRACKERS_FOLDER / f"{tracker}.lock"


def read_position(run: Path, tracker: str) -> Position:
    """The stored position, or a new one if there is none, it is damaged, or the folder was copied or renamed."""
    name = run.resolve().name
    stored = read_json(position_file(run, tracker))
    new = Position(name)
    if stored.get("run_name") != name:
        return new
    known: dict[str, Any] = {key: stored.get(key) for key in asdict(new)}
    return Position(**known) if all(type(known[key]) is type(value) for key, value in asdict(new).items()) else new
