"""Progress of a merge on stderr: a bar on a terminal, otherwise a line every 30 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def merge_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Report the share of the work that is done.

    Yields:
        A function to call with each part of `total`.
    """
    from rich.console import Console  # imported here: scripts that merge may have no terminal
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        *(TextColumn("merging"), BarColumn(), TextColumn("{task.percentage:.0f} %")),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    terminal = sys.stderr.isatty()
    begin = last_line = time.monotonic()
    done = 0
    with Progress(*columns, console=Console(stderr=True), disable=not terminal) as bar:
        task = bar.add_task("", total=total)

        def advance(part: int) -> None:
            nonlocal done, last_line
            done += part
            bar.update(task, advance=part)
            now = time.monotonic()
            if not terminal and now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                print(f"merging: {done / total:.0%} after {now - begin:.0f} s", file=sys.stderr, flush=True)

        yield advance
