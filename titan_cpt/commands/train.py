"""`titan-cpt train`: train every stage of a config that is not trained yet."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, add_config_option


def add_train(subparsers: Subparsers) -> None:
    """The options of `train`."""
    summary = "train every stage that is not trained yet, or resume; run_train.sh starts this on several ranks"
    train = add_command(subparsers, "train", _run, summary, takes_overrides=True)
    add_config_option(train)
    train.add_argument(
        "--run-info", action="store_true", help="check the config and print the run folder; does not train"
    )


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.config.load import load_run

    config = load_run(options.config, options.overrides)  # before torch is imported: config errors are reported at once
    if options.run_info:
        print(f"run_folder={Path(config.job.output_dir) / config.job.name}")
        print(f"init_timeout_seconds={config.comm.init_timeout_seconds}")
        return 0
    from titan_cpt.train import run

    return run(config)
