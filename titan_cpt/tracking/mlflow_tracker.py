"""MLflow. A row's step is run_step; where a run goes back to an earlier step, MLflow keeps both values of the step."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from titan_cpt.config.trackers import MlflowConfig
from titan_cpt.tracking.rows import MetricsRow
from titan_cpt.tracking.run_info import RunInfo, State, flat

_MOST_METRICS = 1000  # in one request
_MOST_PARAMS = 100
_LONGEST_KEY = 250
_LONGEST_VALUE = 6000
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowTracker:
    """A run on an MLflow server or in a local database of MLflow."""

    durable: ClassVar[bool] = True

    def __init__(self, settings: MlflowConfig) -> None:
        self._settings = settings
        self._client: Any = None
        self._run = ""
        self._experiment = ""

    def begin(self, info: RunInfo, tracker_run: str, unfinished: str) -> str:
        """Continue the run if the server has it and it was not deleted, else create one; then log the config."""
        # The sender itself tries again; MLflow's own seven attempts of 120 s each would hide that a server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._settings.tracking_uri)
        run = self._existing(tracker_run) if tracker_run else None
        if run is None:
            run = self._create(info)
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._run, self._experiment = run.info.run_id, run.info.experiment_id
        self._log_config(info, run.data.params)
        return self._run

    def _existing(self, tracker_run: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(tracker_run)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _create(self, info: RunInfo) -> Any:
        settings = self._settings
        name = settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "titan_cpt"
        tags = {**({"group": settings.group} if settings.group else {}), **settings.tags}
        if info.git_commit:
            tags["mlflow.source.git.commit"] = info.git_commit
        if info.config["job"].get("description"):
            tags["mlflow.note.content"] = info.config["job"]["description"]
        return self._client.create_run(
            self._experiment_id(name), run_name=settings.name or info.name, tags={_key(k): v for k, v in tags.items()}
        )

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run of a sweep was faster
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _log_config(self, info: RunInfo, existing: Mapping[str, str]) -> None:
        """Log the config as parameters; MLflow allows no change of one, so a changed value is a tag `changed.KEY`."""
        from mlflow.entities import Param, RunTag

        values = {_key(key): str(value)[:_LONGEST_VALUE] for key, value in flat(info.config)}
        new = [Param(key, value) for key, value in values.items() if key not in existing]
        changed = [
            RunTag(f"changed.{key}"[:_LONGEST_KEY], value)
            for key, value in values.items()
            if existing.get(key, value) != value
        ]
        for first in range(0, len(new), _MOST_PARAMS):
            self._client.log_batch(self._run, params=new[first : first + _MOST_PARAMS])
        if changed:
            self._client.log_batch(self._run, tags=changed[:_MOST_PARAMS])

    def lines_stored(self) -> int:
        """Unknown. A row that is sent twice is one row in MLflow's database: step, time and value are the same."""
        return 0

    def where(self) -> str:
        """The run's page, or its id in a local database."""
        uri = str(self._client.tracking_uri)
        if uri.startswith("http"):
            return f"{uri.rstrip('/')}/#/experiments/{self._experiment}/runs/{self._run}"
        return f"run {self._run} in {uri}"

    def writing(self) -> str:
        """Nothing is incomplete after a request."""
        return ""

    def send(self, rows: Sequence[MetricsRow]) -> None:
        """Send the rows in requests of at most 1,000 values."""
        batch: list[Any] = []
        for row in rows:
            metrics = list(_metrics(row))
            if len(batch) + len(metrics) > _MOST_METRICS:
                self._client.log_batch(self._run, metrics=batch)
                batch = []
            batch += metrics
        if batch:
            self._client.log_batch(self._run, metrics=batch)

    def finish(self, final: MetricsRow | None, state: State) -> None:
        """Log the final values at the last step, and set the run's status."""
        if final:
            self.send([final])
        self._client.set_terminated(self._run, status=_STATUS[state])


def _metrics(row: MetricsRow) -> Iterator[Any]:
    from mlflow.entities import Metric

    for name, value in [*row.values.items(), ("tokens", float(row.tokens))]:
        yield Metric(_key(name), value, int(row.time * 1000), row.run_step)


def _key(name: str) -> str:
    """A name with the characters that MLflow allows: memory/max_active(GiB) becomes memory/max_active_GiB."""
    return re.sub(r"[^\w\-. /]", "_", name).rstrip("_")[:_LONGEST_KEY]
