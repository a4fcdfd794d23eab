"""The interface of the trackers, and the tracker of each table of [metrics]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from titan_cpt.config.schema import MetricsConfig
from titan_cpt.config.trackers import MlflowConfig, TrackioConfig, WandbConfig
from titan_cpt.tracking.mlflow_tracker import MlflowTracker
from titan_cpt.tracking.rows import MetricsRow
from titan_cpt.tracking.run_info import RunInfo, State
from titan_cpt.tracking.trackio_tracker import TrackioTracker
from titan_cpt.tracking.wandb_tracker import WandbTracker

TRACKERS = ("wandb", "mlflow", "trackio")


class Tracker(Protocol):
    """A tracker's client. Every method may raise anything that the client raises, or block for long.

    Attributes:
        durable: what `send` was given is stored when it returns; otherwise when `finish` returns.
    """

    durable: ClassVar[bool]

    def begin(self, info: RunInfo, tracker_run: str, unfinished: str) -> str:
        """Continue the tracker's run of this id, or begin one if the id is "" or the tracker has no such run.

        Args:
            unfinished: what `writing` was in a process that did not reach `finish`; "" after one that did.

        Returns:
            The id of the run in the tracker.
        """

    def lines_stored(self) -> int:
        """Number of the last line of metrics.jsonl that the tracker itself reports to have; 0 if it cannot tell."""

    def where(self) -> str:
        """Where a user finds the run: an address or a command."""

    def writing(self) -> str:
        """A folder that is incomplete until `finish`; "" for none."""

    def send(self, rows: Sequence[MetricsRow]) -> None:
        """Send rows, in the order of the file."""

    def finish(self, final: MetricsRow | None, state: State) -> None:
        """Send the final values, mark how the run ended, and wait until everything is stored.

        Args:
            final: at the place of the last line; None if the tracker already has them or there are none.
        """


def configured(metrics: MetricsConfig) -> list[str]:
    """Names of the trackers that have a table."""
    return [name for name in TRACKERS if getattr(metrics, name) is not None]


def make_tracker(metrics: MetricsConfig, name: str) -> Tracker:
    """The tracker of a table, not opened yet. Does not import its client."""
    settings = getattr(metrics, name)
    match settings:
        case WandbConfig():
            return WandbTracker(settings)
        case MlflowConfig():
            return MlflowTracker(settings)
        case TrackioConfig():
            return TrackioTracker(settings)
    raise ValueError(f"metrics.{name} is not configured")
