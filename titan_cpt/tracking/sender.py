"""Sends the metrics.jsonl of one run to one tracker, from the stored position to the end of the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from titan_cpt.config.schema import MetricsConfig
from titan_cpt.tracking.position import Position, read_position
from titan_cpt.tracking.rows import RowReader
from titan_cpt.tracking.run_info import end_state, final_values, read_run_info
from titan_cpt.tracking.trackers import Tracker, make_tracker

_LONGEST_REASON = 600


class Sender:
    """One session with a tracker. The caller holds the lock of the tracker.

    Args:
        run: the run's folder.
        name: the tracker: wandb, mlflow or trackio.
        live: the run is training now.
    """

    def __init__(self, run: Path, name: str, metrics: MetricsConfig, *, live: bool) -> None:
        self._folder, self._name, self._live = run, name, live
        self._tracker: Tracker = make_tracker(metrics, name)
        self._position = Position("")
        self._reader = RowReader(run)
        self._stored_lines = 0

    def begin(self) -> str:
        """Open the tracker's run and find the position from which to send.

        Returns:
            Where a user finds the run.
        """
        stored = read_position(self._folder, self._name)
        self._reader = RowReader(self._folder)
        if not self._has_read_until(stored):
            stored = Position(stored.run_name)  # metrics.jsonl was replaced: another run in the tracker
            self._reader = RowReader(self._folder)
        info = read_run_info(self._folder, live=self._live)
        tracker_run = self._tracker.begin(info, stored.tracker_run, stored.unfinished)
        if tracker_run != stored.tracker_run:
            stored = Position(stored.run_name, tracker_run)
            self._reader = RowReader(self._folder)
        stored.unfinished = self._tracker.writing()
        stored.save(self._folder, self._name)
        self._position = stored
        self._stored_lines = self._tracker.lines_stored()
        return self._tracker.where()

    def catch_up(self) -> None:
        """Send the lines that were written since the last call."""
        while True:
            before = self._reader.lines
            rows = [row for row in self._reader.read() if row.line > self._stored_lines]
            if self._reader.lines == before:
                return
            if rows:
                self._tracker.send(rows)
            if self._tracker.durable:
                self._save_position()

    def finish(self) -> None:
        """Send the final values if they are new, and how the run ended; wait until everything is stored."""
        final = final_values(self._folder)
        text = json.dumps(final, sort_keys=True)
        is_new = final and text != self._position.final
        self._tracker.finish(self._reader.row_at_end(final) if is_new else None, end_state(self._folder))
        self._position.final, self._position.unfinished = text, ""
        self._save_position()

    def _save_position(self) -> None:
        self._position.lines, self._position.crc = self._reader.lines, self._reader.crc
        self._position.save(self._folder, self._name)

    def _has_read_until(self, stored: Position) -> bool:
        """Read the lines that the tracker has; whether they are there and the last of them is the same."""
        while self._reader.lines < stored.lines:
            before = self._reader.lines
            self._reader.read(stored.lines - before)
            if self._reader.lines == before:
                return False
        return self._reader.crc == stored.crc


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A client's message on one line, without passwords in addresses and without secrets of the environment."""
    text = re.sub(r"://[^/@\s]+@", "://***@", " ".join(text.split()))
    for name, value in environment.items():
        if re.search(r"KEY|TOKEN|PASSWORD|SECRET", name) and len(value) >= 6:
            text = text.replace(value, "***")
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."
