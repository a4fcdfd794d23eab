"""Progress of `prepare` on stderr: a bar on a terminal, otherwise a line every 30 seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from titan_cpt.data.prepare.shards import Counts

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def report_progress(output: Path, total_bytes: int, *, show: bool) -> Iterator[Callable[[int, Counts], None]]:
    """Report the fraction of the input that was read, and the numbers of documents and tokens.

    Yields:
        A function to call after each chunk, with its bytes on disk and its counts.
    """
    console = Console(stderr=True)
    columns = (TextColumn("tokenizing"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    counted = TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens")
    bar = Progress(
        *columns,
        counted,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (show and console.is_terminal),
    )
    with bar:
        task = bar.add_task("", total=total_bytes or None, documents=0, tokens=0)
        so_far = Counts()
        read_bytes = 0
        begin = time.monotonic()
        last_line = begin

        def advance(disk_bytes: int, counts: Counts) -> None:
            nonlocal so_far, read_bytes, last_line
            so_far += counts
            read_bytes += disk_bytes
            documents = so_far.documents + so_far.held_out_documents
            tokens = so_far.tokens + so_far.held_out_tokens
            bar.update(task, advance=disk_bytes, documents=documents, tokens=tokens)
            now = time.monotonic()
            if show and not console.is_terminal and now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                share = f"{min(read_bytes / total_bytes, 1):.0%} of the input, " if total_bytes else ""
                line = f"{output}: {share}{documents:,} documents, {tokens:,} tokens after {now - begin:.0f} s"
                print(line, file=sys.stderr, flush=True)

        yield advance
