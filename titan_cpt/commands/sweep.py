"""`titan-cpt sweep`: train the runs of `[sweep]` files, one after another or as a Slurm array."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command, add_dry_run_option, integer
from titan_cpt.errors import ConfigError, DataError, PlanError


def add_sweep(subparsers: Subparsers) -> None:
    """The options of `sweep`."""
    summary = "train the runs of files with a [sweep] table"
    sweep = add_command(
        subparsers,
        "sweep",
        _run,
        summary,
        details="Stages that several runs share are trained once, and runs that are done are skipped. With [sweep.fit] "
        "a law is fitted to the losses afterwards.",
        usage="FILE [FILE ...] [options] [--table.key VALUE ...]",
        example="titan-cpt sweep sweep.toml --dry-run\ntitan-cpt sweep sweep.toml --launch ./run_train.sh",
        takes_overrides=True,
    )
    sweep.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="TOML files; a file without [sweep] is a single run"
    )
    sweep.add_argument("--config", type=Path, metavar="FILE", help="another way to give a TOML file")
    sweep.add_argument(
        "--index",
        type=integer,
        metavar="N",
        help="train only run N, counted from 0 (default: SLURM_ARRAY_TASK_ID, or all runs without it)",
    )
    sweep.add_argument("--arm", type=integer, dest="index", help=argparse.SUPPRESS)  # old name of --index
    add_dry_run_option(sweep, "the runs with their steps, tokens and compute", "--plan")
    sweep.add_argument(
        "--fit", action="store_true", help="fit the law of [sweep.fit] to the runs that are done, and train nothing"
    )
    sweep.add_argument("--prepare-only", action="store_true", help="write the run folders, and do not train")
    add_launch_option(sweep)


def add_launch_option(parser: argparse.ArgumentParser) -> None:
    """`--launch COMMAND`, for each run's processes."""
    parser.add_argument(
        "--launch",
        metavar="COMMAND",
        help="the command that trains each run, such as ./run_train.sh (default: one process)",
    )


def _run(options: argparse.Namespace) -> int:
    files = [*options.files, *([options.config] if options.config and options.config not in options.files else [])]
    if not files:
        raise ConfigError("command line: the TOML file is missing; write `titan-cpt sweep FILE`")
    if options.dry_run:
        from titan_cpt.common.console import make_console
        from titan_cpt.runs.sweep_table import print_sweep_plan

        print_sweep_plan(files, options.overrides, make_console())
        return 0
    if options.fit:
        return _fit(files, options.overrides)
    index = options.index
    if index is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        index = int(os.environ["SLURM_ARRAY_TASK_ID"])
    return run_sweep(files, options.overrides, launch=options.launch, only=index, train=not options.prepare_only)


def _fit(files: Sequence[Path], overrides: Sequence[tuple[str, str]]) -> int:
    from titan_cpt.common.console import make_console
    from titan_cpt.runs.laws.report import fit_sweep, require_fit

    settings = require_fit(files, overrides)
    if settings is None:
        raise ConfigError(
            f"--fit: {files[0]} has no [sweep.fit], which names the law; docs/guides/laws.md has examples"
        )
    fit_sweep(files, overrides, settings, make_console())
    return 0


def run_sweep(
    files: Sequence[Path],
    overrides: Sequence[tuple[str, str]],
    *,
    launch: str | None,
    only: int | None = None,
    train: bool = True,
) -> int:
    """Train the runs of the files and print a table of how each ended; returns the exit status.

    Args:
        launch: shell words of the command that trains a run; None for one process.
        only: index of the one run to train; None for all.
        train: False writes the run folders only.

    Raises:
        PlanError: this process was started by torchrun.
    """
    from rich.markup import escape

    from titan_cpt.common.console import make_console
    from titan_cpt.common.exit_status import STOPPED_EARLY
    from titan_cpt.runs.laws.report import fit_sweep, require_fit
    from titan_cpt.runs.sweep import TRAIN, exit_status, train_sweep_runs
    from titan_cpt.runs.sweep_table import print_outcomes

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise PlanError(
            "sweep was started by torchrun: start it without; --launch ./run_train.sh starts each run's processes"
        )
    command = shlex.split(launch) if launch else TRAIN
    settings = require_fit(files, overrides)  # before training: scipy may be missing
    outcomes = train_sweep_runs(files, overrides, only=only, launch=command, train=train)
    console = make_console()
    print_outcomes(outcomes, console)
    if settings is not None and train and only is None and exit_status(outcomes) != STOPPED_EARLY:
        try:
            fit_sweep(files, overrides, settings, console)
        except DataError as error:
            console.print(f"[bold]the law was not fitted[/]: {escape(str(error))}", highlight=False)
    return exit_status(outcomes)
