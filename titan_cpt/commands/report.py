"""`titan-cpt report`: compare the losses, forgetting and adaptation of runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from titan_cpt.commands.arguments import Subparsers, add_command
from titan_cpt.errors import DataError


def add_report(subparsers: Subparsers) -> None:
    """The options of `report`."""
    summary = "print or draw what runs learned and forgot"
    report = add_command(
        subparsers,
        "report",
        _run,
        summary,
        details="Validation losses, forgetting and adaptation, as tables or as an HTML page with figures.",
        usage="RUN [RUN ...] [options]",
        example="titan-cpt report outputs/mine\n"
        'titan-cpt report outputs/mine "no replay=outputs/no_replay" --html comparison',
    )
    report.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders, such as outputs/quickstart; LABEL=FOLDER names a run in tables and figures",
    )
    report.add_argument(
        "--html",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FOLDER",
        help="write index.html and its figures into this folder (default: report/ in or beside the run folders)",
    )

    report.add_argument(
        "--json", action="store_true", help="print one JSON object with the losses by stage and dataset"
    )


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.common.console import make_console
    from titan_cpt.reporting.comparison import print_runs
    from titan_cpt.reporting.run_log import read_runs

    unread: list[str] = []
    records = read_runs(options.runs, unread.append)
    if options.json:
        from titan_cpt.reporting.page_data import summaries_of
        from titan_cpt.reporting.run_log import with_unique_names

        print(json.dumps({"runs": summaries_of(with_unique_names(records)), "unread": unread}))
    else:
        print_runs(records, make_console())
    if options.html is not None and records:
        from titan_cpt.reporting.html_page import default_folder, write_page

        out = default_folder([record.folder for record in records]) if options.html == Path() else options.html
        page = write_page(records, out)
        print(f"HTML page: {page}", file=sys.stderr if options.json else sys.stdout)
    if unread:
        raise DataError("\n  ".join(unread))
    return 0
