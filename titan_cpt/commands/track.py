"""`titan-cpt track`: send finished, old or running runs to their trackers."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command
from titan_cpt.errors import ConfigError


def add_track(subparsers: Subparsers) -> None:
    """The options of `track`."""
    track = add_command(
        subparsers,
        "track",
        _run,
        "send runs to Weights & Biases, MLflow or trackio",
        details="A run with metrics.wandb, metrics.mlflow or metrics.trackio is sent while it trains; this command "
        "sends what a tracker lacks after a failure, or runs that were trained without one.",
        usage="RUN [RUN ...] [options]",
        example="titan-cpt track outputs/mine\ntitan-cpt track outputs/mine --metrics.mlflow.experiment gemma --follow",
        takes_overrides=True,
    )
    track.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    track.add_argument(
        "--follow",
        action="store_true",
        help="keep sending what one run that trains elsewhere writes, until Ctrl-C",
    )


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.tracking.send_runs import follow_run, send_runs

    if not options.follow:
        return send_runs(options.runs, options.overrides)
    if len(options.runs) > 1:
        raise ConfigError(f"command line: --follow takes one run, got {len(options.runs)}; start one command for each")
    return follow_run(options.runs[0], options.overrides)
