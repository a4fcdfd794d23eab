"""`titan-cpt runs`: list runs with state, step, losses and size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command


def add_runs(subparsers: Subparsers) -> None:
    """The options of `runs`."""
    runs = add_command(
        subparsers,
        "runs",
        _run,
        "list runs with state, step, losses and size",
        details="States: running, finished, stopped (by a signal, and saved), failed, planned (not begun), damaged.",
        usage="[FOLDER] [options]",
        example="titan-cpt runs\ntitan-cpt runs outputs --sort size --json",
    )
    runs.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        default=Path("outputs"),
        help="the folder that contains the runs, or a run (default: outputs)",
    )
    runs.add_argument(
        "--sort", choices=("age", "name", "size"), default="age", help="order (default: age, the last written first)"
    )
    runs.add_argument("--json", action="store_true", help="print one JSON object")


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.reporting.run_list import list_runs, print_runs_table

    found = list_runs(options.folder, options.sort)
    if options.json:
        print(json.dumps({"runs": [run.as_json() for run in found]}))
    else:
        from titan_cpt.common.console import make_console

        print_runs_table(found, make_console())
    return 0
