"""Weights & Biases. A row's step in wandb is its line number in metrics.jsonl; the x axis of the charts is run_step.

wandb drops rows whose step is not greater than the last one. Line numbers always grow, also where a run goes back to an
earlier step, so no row is lost; and a row that is sent twice is dropped.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from titan_cpt.common.run_folder import TRACKERS_FOLDER
from titan_cpt.config.trackers import WandbConfig
from titan_cpt.tracking.rows import MetricsRow
from titan_cpt.tracking.run_info import RunInfo, State

_INIT_TIMEOUT_S = 30


class WandbTracker:
    """A run in Weights & Biases, online or offline."""

    durable: ClassVar[bool] = False  # wandb sends in a process of its own, and does not say what it has sent

    def __init__(self, settings: WandbConfig) -> None:
        self._settings = settings
        self._run: Any = None

    def begin(self, info: RunInfo, tracker_run: str, unfinished: str) -> str:
        """Continue or begin the run. An unfinished offline folder is removed: its rows are sent again."""
        import wandb

        wandb.teardown()  # of a connection that failed
        offline = (self._settings.mode or os.environ.get("WANDB_MODE", "online")) == "offline"
        if unfinished and offline:
            shutil.rmtree(info.folder / TRACKERS_FOLDER / "wandb" / Path(unfinished).name, ignore_errors=True)
        folder = info.folder / TRACKERS_FOLDER
        before = {*folder.glob("wandb/run-*")}
        try:
            self._run = self._init(info, tracker_run or secrets.token_hex(4), folder)
        except BaseException:
            for new in {*folder.glob("wandb/run-*")} - before:
                shutil.rmtree(new, ignore_errors=True)  # one for each attempt; nothing was logged yet
            raise
        self._run.config.update(info.config, allow_val_change=True)
        for axis in ("run_step", "tokens"):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="run_step")
        return str(self._run.id)

    def _init(self, info: RunInfo, tracker_run: str, folder: Path) -> Any:
        import wandb

        settings = self._settings
        return wandb.init(
            project=settings.project or os.environ.get("WANDB_PROJECT") or "titan_cpt",
            entity=settings.entity,
            group=settings.group,
            name=settings.name or info.name,
            tags=settings.tags,
            notes=info.config["job"].get("description") or None,
            id=tracker_run,
            resume="allow",
            mode=settings.mode,
            dir=str(folder),
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, x_disable_stats=True, init_timeout=_INIT_TIMEOUT_S
            ),
        )

    def lines_stored(self) -> int:
        """The last step that the server reports for a continued run; 0 offline."""
        return max(0, int(self._run.step) - 1)

    def where(self) -> str:
        """The run's page, or how to upload the offline files."""
        if self._run.offline:
            return f"offline; to upload: wandb sync {Path(self._run.settings.wandb_dir) / 'offline-run-*'}"
        return str(self._run.url)

    def writing(self) -> str:
        """The folder with the file of this session."""
        return Path(self._run.settings.sync_dir).name

    def send(self, rows: Sequence[MetricsRow]) -> None:
        """Hand the rows to wandb's own process."""
        for row in rows:
            axes = {"run_step": row.run_step, "tokens": row.tokens, "_timestamp": row.time}
            self._run.log({**row.values, **axes}, step=row.line)

    def finish(self, final: MetricsRow | None, state: State) -> None:
        """Write the final values into the run's summary and wait for the upload."""
        for name, value in final.values.items() if final else ():
            self._run.summary[name] = value
        self._run.finish(exit_code=1 if state == "failed" else 0)
