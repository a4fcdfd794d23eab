"""Progress of `prepare` on stderr: a bar on a terminal, otherwise a line every 30 seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from titan_cpt.data.prepare.shards import Counts

SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_BARS = 0.1


@contextmanager
def report_progress(output: Path, total_bytes: int, *, show: bool) -> Iterator[Callable[[int, Counts], None]]:
    """Report the fraction of the input that was read, and the numbers of documents and tokens.

    Yields:
        A function to call after each chunk, with its bytes on disk and its counts.
    """
    terminal = sys.stderr.isatty()
    so_far = Counts()
    read_bytes = 0
    begin = time.monotonic()
    last_line = begin
    with _bar(total_bytes) if show and terminal else nullcontext(_no_bar) as update:

        def advance(disk_bytes: int, counts: Counts) -> None:
            nonlocal so_far, read_bytes, last_line
            so_far += counts
            read_bytes += disk_bytes
            documents = so_far.documents + so_far.held_out_documents
            tokens = so_far.tokens + so_far.held_out_tokens
            update(disk_bytes, documents, tokens)
            now = time.monotonic()
            if show and not terminal and now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                share = f"{min(read_bytes / total_bytes, 1):.0%} of the input, " if total_bytes else ""
                line = f"{output}: {share}{documents:,} documents, {tokens:,} tokens after {now - begin:.0f} s"
                print(line, file=sys.stderr, flush=True)

        yield advance


@contextmanager
def _bar(total_bytes: int) -> Iterator[Callable[[int, int, int], None]]:
    """Show a bar; yields a function that takes the bytes to add, and the numbers of documents and tokens.

    The bar is drawn by that function, not by a thread of its own: a process with several threads cannot fork workers.
    """
    from rich.console import Console  # imported here: most runs that are timed or logged have no terminal
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        *(TextColumn("tokenizing"), BarColumn(), TextColumn("{task.percentage:.0f} %")),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("", total=total_bytes or None, documents=0, tokens=0)
        bar.refresh()
        drawn = time.monotonic()

        def update(more: int, documents: int, tokens: int) -> None:
            nonlocal drawn
            bar.update(task, advance=more, documents=documents, tokens=tokens)
            if time.monotonic() - drawn >= _SECONDS_BETWEEN_BARS:
                bar.refresh()
                drawn = time.monotonic()

        yield update
        bar.refresh()


def _no_bar(more: int, documents: int, tokens: int) -> None:
    """Show nothing."""
