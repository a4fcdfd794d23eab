"""`titan-cpt anneal`: branch off a constant-LR phase and anneal the learning rate."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, learning_rate, token_count


def add_anneal(subparsers: Subparsers) -> None:
    """The options of `anneal`."""
    summary = "start a new run from a checkpoint of a constant-LR phase and anneal its learning rate"
    anneal = add_command(subparsers, "anneal", _run, summary, takes_overrides=True)
    anneal.epilog = f"{anneal.epilog}. --job.name NAME names the new run; one checkpoint can have several."
    anneal.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="such as outputs/RUN/STAGE/step-00080000")
    anneal.add_argument(
        "--tokens", type=token_count, required=True, metavar="N", help="length of the annealing in tokens, such as 10B"
    )
    anneal.add_argument(
        "--min", type=learning_rate, metavar="LR", help="learning rate of the last step (default: the stage's minimum)"
    )
    anneal.add_argument("--prepare-only", action="store_true", help="write the run folder; does not train")


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.common.run_folder import CONFIG_FILE
    from titan_cpt.runs.anneal import branch_off

    rank = int(os.environ.get("RANK", "0"))
    config, is_new = branch_off(
        options.checkpoint, tokens=options.tokens, min_lr=options.min, overrides=options.overrides, rank=rank
    )
    folder = Path(config.job.output_dir) / config.job.name
    if rank == 0:
        state = "created" if is_new else "exists already"
        print(f"{folder}: {state}; ./run_train.sh --config {folder / CONFIG_FILE} trains it")
    if options.prepare_only:
        return 0
    from titan_cpt.train import run

    return run(config)
