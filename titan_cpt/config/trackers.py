"""Tables of experiment trackers, [metrics.wandb], [metrics.mlflow] and [metrics.trackio].

Tokens and passwords are no keys: the resolved config is written into the run's folder. Each tracker's client reads them
from its own environment variables and files.
"""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from titan_cpt.config.types import Strings, Table, validation_error

Text = Annotated[str, Field(min_length=1)]


def _without_secrets(value: str) -> str:
    parts = urlsplit(value)
    if parts.password or (parts.username and parts.scheme.startswith("http")) or "token=" in parts.query:
        raise validation_error(
            "must not contain a user name, a password or a token, because it is written into the run's folder; set the "
            "environment variables of the tracker's client instead"
        )
    return value


Address = Annotated[Text, AfterValidator(_without_secrets)]


class WandbConfig(Table):
    """[metrics.wandb]: send the metrics to Weights & Biases. The client reads the API key from its own environment."""

    project: Text | None = None
    """Project. Unset: the environment variable WANDB_PROJECT, else titan_cpt."""
    entity: Text | None = None
    """User or team. Unset: the account's default."""
    group: Text | None = None
    """Group of runs. Unset: none; in a sweep, its job.name."""
    name: Text | None = None
    """Name of the run in the tracker. Unset: job.name."""
    tags: Strings | None = None
    """Tags. Unset: none."""
    mode: Literal["online", "offline"] | None = None
    """offline: write files below trackers/wandb/ in the run's folder, which `wandb sync` uploads later. Unset: the
    environment variable WANDB_MODE, else online."""


class MlflowConfig(Table):
    """[metrics.mlflow]: send the metrics to MLflow. The client reads user name, password or token from its own
    environment.
    """

    tracking_uri: Address | None = None
    """Server (http://host:port), or a local database (sqlite:///path/mlflow.db). Unset: the environment variable
    MLFLOW_TRACKING_URI, else MLflow's default."""
    experiment: Text | None = None
    """Experiment, created if it is missing. Unset: the environment variable MLFLOW_EXPERIMENT_NAME, else titan_cpt."""
    group: Text | None = None
    """Value of the tag `group`. Unset: none; in a sweep, its job.name."""
    name: Text | None = None
    """Name of the run in the tracker. Unset: job.name."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags and their values."""


class TrackioConfig(Table):
    """[metrics.trackio]: send the metrics to trackio: to a database on this machine, a Hugging Face Space or a server.
    The client reads tokens from its own environment.
    """

    project: Text | None = None
    """Project. Unset: titan_cpt."""
    space_id: Text | None = None
    """Hugging Face Space, such as "user/space"; created if it is missing. Unset: no Space."""
    server_url: Address | None = None
    """Address of a trackio server. Unset: no server."""
    group: Text | None = None
    """Group of runs. Unset: none; in a sweep, its job.name."""
    name: Text | None = None
    """Name of the run in the tracker, which must be unique in the project. Unset: job.name, in a group GROUP-NAME."""
