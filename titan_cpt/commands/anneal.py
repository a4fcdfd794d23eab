"""`titan-cpt anneal`: branch off a constant-LR phase and anneal the learning rate."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, add_dry_run_option, learning_rate, token_count
from titan_cpt.commands.plan import print_plan_of


def add_anneal(subparsers: Subparsers) -> None:
    """The options of `anneal`."""
    summary = "anneal the learning rate from a checkpoint, in a new run"
    anneal = add_command(
        subparsers,
        "anneal",
        _run,
        summary,
        details="The checkpoint is one of a constant-LR phase; its run is not changed. --job.name NAME names the new "
        "run, so that one checkpoint can have several.",
        usage="CHECKPOINT --tokens N [options] [--table.key VALUE ...]",
        example="titan-cpt anneal outputs/mine/news/step-00000200 --tokens 100K\n"
        "titan-cpt anneal outputs/mine/news/step-00000200 --tokens 1M --job.name b",
        takes_overrides=True,
    )
    anneal.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, such as outputs/RUN/STAGE/step-00080000"
    )
    anneal.add_argument(
        "--tokens", type=token_count, required=True, metavar="N", help="number of tokens to anneal over, such as 10B"
    )
    anneal.add_argument(
        "--min", type=learning_rate, metavar="LR", help="learning rate of the last step (default: the stage's minimum)"
    )
    add_dry_run_option(anneal, "the plan of the new run")
    anneal.add_argument("--prepare-only", action="store_true", help="write the run folder, and do not train")


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.common.run_folder import CONFIG_FILE
    from titan_cpt.runs.anneal import branch_off

    rank = int(os.environ.get("RANK", "0"))
    config, is_new = branch_off(
        options.checkpoint,
        tokens=options.tokens,
        min_lr=options.min,
        overrides=options.overrides,
        writes=rank == 0 and not options.dry_run,
    )
    if options.dry_run:
        if rank == 0:
            print_plan_of(config)
        return 0
    folder = Path(config.job.output_dir) / config.job.name
    if rank == 0:
        state = "created" if is_new else "exists already"
        next_step = "to train it" if options.prepare_only else "training it now; to resume it"
        print(f"{folder}: {state}; {next_step}: ./run_train.sh {folder / CONFIG_FILE}")
    if options.prepare_only:
        return 0
    from titan_cpt.train import run

    return run(config)
