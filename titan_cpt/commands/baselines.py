"""`titan-cpt baselines`: write the configs of the runs to compare a config with."""

from __future__ import annotations

import argparse
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, add_config_option, add_dry_run_option, config_path
from titan_cpt.commands.sweep import add_launch_option, run_sweep


def add_baselines(subparsers: Subparsers) -> None:
    """The options of `baselines`."""
    summary = "write the configs of runs to compare a config with"
    baselines = add_command(
        subparsers,
        "baselines",
        _run,
        summary,
        details="Such as joint training on all data, no replay, and constant learning rates.",
        usage="FILE [options] [--table.key VALUE ...]",
        example="titan-cpt baselines mine.toml --output baselines",
        takes_overrides=True,
    )
    add_config_option(baselines)
    baselines.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="the folder to write the TOML files into (default: below job.output_dir)",
    )
    add_dry_run_option(baselines, "the files that would be written")
    baselines.add_argument("--run", action="store_true", dest="train", help="train the config and all baselines")
    add_launch_option(baselines)


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.config.load import load_run
    from titan_cpt.data.inventory import take_inventory
    from titan_cpt.planning.parallel import min_world_size
    from titan_cpt.planning.planner import make_plan
    from titan_cpt.runs.baselines import write_baselines

    config = load_run(config_path(options), options.overrides)
    plan = make_plan(config, take_inventory(config), min_world_size(config))
    paths = write_baselines(config, plan, options.output, dry_run=options.dry_run)
    if options.dry_run:
        return 0
    if options.train:
        return run_sweep(paths, [], launch=options.launch)
    print(f"titan-cpt sweep {paths[0].parent}/*.toml   # trains the config and its baselines, shared stages once")
    return 0
