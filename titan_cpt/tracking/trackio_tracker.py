"""trackio. A row's step is run_step; where a run goes back to an earlier step, trackio keeps both values of the step.

trackio's client queues rows and prints a warning if it cannot store them. `finish` is its only call that waits, so each
`send` ends with it, and a warning is an error here unless trackio itself keeps the rows to send them later.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from titan_cpt.config.trackers import TrackioConfig
from titan_cpt.tracking.rows import MetricsRow
from titan_cpt.tracking.run_info import RunInfo, State, flat


class TrackioTracker:
    """A run in trackio: local, in a Hugging Face Space, or on a server."""

    durable: ClassVar[bool] = True

    def __init__(self, settings: TrackioConfig) -> None:
        self._settings = settings
        self._project = settings.project or "titan_cpt"
        self._config: dict[str, Any] = {}
        self._name = ""
        self._id = ""
        self._run: Any = None

    def begin(self, info: RunInfo, tracker_run: str, unfinished: str) -> str:
        """Continue the run if trackio has it, or begin one."""
        settings = self._settings
        self._config = {key: value for key, value in flat(info.config) if not key.startswith("_")}
        self._name = settings.name or (f"{settings.group}-{info.name}" if settings.group else info.name)
        with self._failures():
            try:
                self._init("must" if tracker_run else "never")
            except ValueError:
                if not tracker_run:
                    raise
                self._init("never")  # the user deleted the run
            else:
                self._require_id(tracker_run or self._run.id)
        self._id = str(self._run.id)
        return self._id

    def _require_id(self, tracker_run: str) -> None:
        """Check that the run that trackio found by its name is ours."""
        if self._run.id != tracker_run:
            self._close()
            raise RuntimeError(
                f"trackio finds runs by name, and another run named {self._name!r} was begun in project "
                f"{self._project!r}: give one of them another metrics.trackio.name"
            )

    def _init(self, resume: str) -> None:
        import trackio

        settings = self._settings
        self._run = trackio.init(
            self._project,
            name=self._name,
            group=settings.group,
            space_id=settings.space_id,
            server_url=settings.server_url,
            config=self._config,
            resume=resume,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def _close(self) -> None:
        """Wait until everything is stored. `Run.finish` would be repeated when the process ends."""
        import trackio

        trackio.finish()
        self._run = None

    def lines_stored(self) -> int:
        """Unknown."""
        return 0

    def where(self) -> str:
        """The command that shows the project, or its Space or server."""
        settings = self._settings
        return settings.space_id or settings.server_url or f"to see it: trackio show --project {self._project}"

    def writing(self) -> str:
        """Nothing is incomplete after `send`."""
        return ""

    def send(self, rows: Sequence[MetricsRow]) -> None:
        """Send the rows and wait until they are stored."""
        if not rows:
            return
        with self._failures():
            if self._run is None:
                self._init("must")
                self._require_id(self._id)
            for row in rows:
                self._run.log({**row.values, "tokens": row.tokens}, step=row.run_step)
            self._close()

    def finish(self, final: MetricsRow | None, state: State) -> None:
        """Log the final values at the last step."""
        if final:
            self.send([final])
        elif self._run is not None:
            with self._failures():
                self._close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Raise what trackio only warns of; its progress messages are dropped."""
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("always")
            yield
        messages = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
        if messages and self._settings.space_id is None and self._settings.server_url is None:
            raise RuntimeError("; ".join(messages))
        for message in messages:
            print(message)
