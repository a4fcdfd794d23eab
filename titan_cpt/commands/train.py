"""`titan-cpt train`: train every stage of a config that is not trained yet."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from titan_cpt.commands.arguments import (
    Subparsers,
    add_command,
    add_config_option,
    add_dry_run_option,
    add_verbosity_options,
    config_path,
)
from titan_cpt.commands.plan import print_plan_of


def add_train(subparsers: Subparsers) -> None:
    """The options of `train`."""
    summary = "train a config, or resume it where it stopped"
    train = add_command(
        subparsers,
        "train",
        _run,
        summary,
        details="Stages that are trained already are skipped. ./run_train.sh starts this command on one or several "
        "processes.",
        usage="FILE [options] [--table.key VALUE ...]",
        example="titan-cpt train mine.toml\ntitan-cpt train mine.toml --job.name b --stages.german.replay.fraction 0",
        takes_overrides=True,
    )
    add_config_option(train)
    add_verbosity_options(train)
    add_dry_run_option(train, "the plan")
    train.add_argument(
        "--run-info", action="store_true", help="check the config, print the run folder, and do not train"
    )


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.config.load import load_run

    config = load_run(config_path(options), options.overrides)  # before torch is imported: errors are reported at once
    if options.run_info:
        print(f"run_folder={Path(config.job.output_dir) / config.job.name}")
        print(f"init_timeout_seconds={config.comm.init_timeout_seconds}")
        return 0
    if options.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print_plan_of(config, int(os.environ.get("WORLD_SIZE", "0")) or None)
        return 0
    from titan_cpt.common.console import Verbosity
    from titan_cpt.train import run

    return run(config, verbosity=Verbosity.of(quiet=options.quiet, verbose=options.verbose))
