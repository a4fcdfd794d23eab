"""Send run folders to their trackers, for `titan-cpt track`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from titan_cpt.common.exit_status import FAILURE, SUCCESS
from titan_cpt.common.file_lock import exclusive
from titan_cpt.common.run_folder import CONFIG_FILE, METRICS_FILE, TRACKERS_FOLDER
from titan_cpt.common.signals import StopRequest
from titan_cpt.config.load import load_run
from titan_cpt.config.schema import Config
from titan_cpt.errors import ConfigError, DataError
from titan_cpt.reporting.run_log import explain_missing_run
from titan_cpt.tracking.follower_process import require_clients, trackers_following
from titan_cpt.tracking.position import lock_file
from titan_cpt.tracking.sender import Sender, without_secrets
from titan_cpt.tracking.trackers import TRACKERS, configured

_POLL_S = 0.2

Overrides = Sequence[tuple[str, str]]


def send_runs(runs: Sequence[Path], overrides: Overrides) -> int:
    """Send each run to each of its trackers, and print where it is found.

    Args:
        overrides: settings that replace those of the runs' config.toml, such as ("metrics.mlflow.experiment", "old").

    Returns:
        The exit status: 1 if a tracker failed.

    Raises:
        DataError: a folder is not a run folder.
        ConfigError: a run has no tracker, the client of one is not installed, or another process sends the run now.
    """
    configs = [(run, _config(run, overrides)) for run in runs]
    sent = [_send(run, config, name) for run, config in configs for name in configured(config.metrics)]
    return SUCCESS if all(sent) else FAILURE


def follow_run(run: Path, overrides: Overrides) -> int:
    """Send what a run writes, as the trainer does, until SIGINT, SIGTERM or SIGUSR1.

    Returns:
        The exit status.

    Raises:
        DataError: the folder is not a run folder.
        ConfigError: the run has no tracker, or the client of one is not installed.
    """
    config = _config(run, overrides)
    following = trackers_following(
        config, run, stop=StopRequest(), say=print, warn=print, begins=False, overrides=overrides
    )
    with StopRequest() as stop, following:
        while not stop.name:
            time.sleep(_POLL_S)
    return SUCCESS


def _config(run: Path, overrides: Overrides) -> Config:
    if not (run / METRICS_FILE).is_file():
        raise DataError(explain_missing_run(run))
    if not (run / CONFIG_FILE).is_file():
        raise DataError(f"{run}: is not the folder of a run: it has no {CONFIG_FILE}")
    config = load_run(run / CONFIG_FILE, overrides)
    if not configured(config.metrics):
        tables = ", ".join(f"metrics.{name}" for name in TRACKERS)
        raise ConfigError(
            f"{run / CONFIG_FILE}: has no tracker ({tables}); name one here, such as --metrics.mlflow.experiment NAME"
        )
    require_clients(config)
    return config


def _send(run: Path, config: Config, name: str) -> bool:
    """Send a run to one tracker; False, with a message, if that fails."""
    (run / TRACKERS_FOLDER).mkdir(exist_ok=True)

    def held(by: str) -> ConfigError:
        return ConfigError(f"{run}: another process is sending this run to {name} now{by}. Wait until it ends")

    with exclusive(lock_file(run, name), held=held):
        try:
            sender = Sender(run, name, config.metrics, live=False)
            print(f"{run}: {name}: {sender.begin()}")
            sender.catch_up()
            sender.finish()
        except (Exception, SystemExit) as error:  # clients raise anything, and one of them exits
            reason = without_secrets(f"{type(error).__name__}: {error}")
            print(f"{run}: {name} failed: {reason}. The same command continues", file=sys.stderr)
            return False
    return True
