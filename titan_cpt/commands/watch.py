"""`titan-cpt watch`: a running or finished run in a terminal."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from titan_cpt.commands.arguments import Subparsers, add_command, seconds
from titan_cpt.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console, Group

    from titan_cpt.reporting.watch.run_follower import RunFollower

_FIRST_LINES_BYTES = 1 << 22  # of a long metrics.jsonl, between two pictures


def add_watch(subparsers: Subparsers) -> None:
    """The options of `watch`."""
    watch = add_command(
        subparsers,
        "watch",
        _run,
        "follow a run in a terminal",
        details="Shows stages, losses, forgetting, throughput, time left, the newest checkpoint and the last events, "
        "of a run that is training here or on another machine with the same file system. Ctrl-C leaves it.",
        usage="RUN [options]",
        example="titan-cpt watch outputs/mine\ntitan-cpt watch outputs/mine --once",
    )
    watch.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    watch.add_argument(
        "--once", action="store_true", help="print the current state once and exit, as without a terminal"
    )
    watch.add_argument("--wait", action="store_true", help="wait for a run that does not exist yet")
    watch.add_argument(
        "--interval", type=seconds, default=2.0, metavar="S", help="seconds between two updates (default: 2)"
    )


def _run(options: argparse.Namespace) -> int:
    from titan_cpt.common.console import TEXT_COLUMNS, make_console
    from titan_cpt.reporting.run_log import explain_missing_run
    from titan_cpt.reporting.watch.run_follower import RunFollower

    console = make_console(TEXT_COLUMNS)
    run = RunFollower(options.folder)
    try:
        if not run.is_there and options.wait:
            print(f"waiting for {options.folder}; Ctrl-C ends this", file=sys.stderr)
        while not run.is_there:
            if not options.wait:
                wait = "" if options.folder.exists() else ". --wait waits for a run that begins later"
                raise DataError(f"{explain_missing_run(options.folder)}{wait}")
            time.sleep(options.interval)
        if options.once or not console.is_terminal:
            while run.refresh():
                pass
            console.print(_picture(run, console, height=10**6))
        else:
            _follow(run, console, options.interval)
    except KeyboardInterrupt:
        pass  # the usual way to leave
    return 0


def _follow(run: RunFollower, console: Console, interval_s: float) -> None:
    """Draw the run again and again until it has finished; the last picture stays on the terminal."""
    from rich.live import Live

    from titan_cpt.reporting.run_state import FINISHED

    try:
        with Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False) as live:
            while True:
                has_more = run.refresh(_FIRST_LINES_BYTES)
                live.update(_picture(run, console, console.height), refresh=True)
                if not has_more:
                    if run.state()[0] == FINISHED:
                        break
                    time.sleep(interval_s)
    finally:
        console.print(_picture(run, console, height=10**6))


def _picture(run: RunFollower, console: Console, height: int) -> Group:
    from rich.console import Group
    from rich.text import Text

    from titan_cpt.reporting.watch.sparkline import to_ascii
    from titan_cpt.reporting.watch.view import screen

    state, why = run.state()
    rows = screen(run, state, why, width=console.width, height=height, now=time.time())
    ascii_only = console.options.ascii_only
    return Group(
        *(
            Text(to_ascii(row.text) if ascii_only else row.text, row.style, no_wrap=True, overflow="crop")
            for row in rows
        )
    )
