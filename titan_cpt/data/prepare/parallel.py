"""Tokenize all chunks into shards, in worker processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from titan_cpt.data.prepare.chunks import Chunk, read_chunks
from titan_cpt.data.prepare.progress import report_progress
from titan_cpt.data.prepare.shards import Counts, TokenizeJob, encode_chunk, finished_counts, start_worker
from titan_cpt.data.prepare.text_inputs import TextInput
from titan_cpt.errors import DataError

CHUNKS_AHEAD = 2  # chunks in memory for each worker


def encode_all(
    sources: Sequence[TextInput], job: TokenizeJob, *, output: Path, workers: int, show_progress: bool
) -> tuple[list[tuple[Path, Counts]], int]:
    """Write the shards that do not exist yet. Returns (prefix, counts) of all in text order, and how many existed."""
    shards: list[tuple[Path, Counts]] = []
    pending: deque[tuple[int, Path, Future[Counts]]] = deque()
    reused = 0
    total_bytes = sum(source.disk_bytes for source in sources)
    with report_progress(output, total_bytes, show=show_progress) as advance, _pool(workers) as pool:

        def take_oldest() -> None:
            disk_bytes, shard, future = pending.popleft()
            shards.append((shard, _result(future)))
            advance(disk_bytes, shards[-1][1])

        for chunk in read_chunks(sources, job.text_field):
            shard = job.shard_of(chunk)
            finished = finished_counts(shard)
            reused += finished is not None
            pending.append((chunk.disk_bytes, shard, _submit(pool, chunk, job, finished)))
            if len(pending) > CHUNKS_AHEAD * workers:
                take_oldest()
        while pending:
            take_oldest()
    return shards, reused


def _submit(pool: Executor | None, chunk: Chunk, job: TokenizeJob, finished: Counts | None) -> Future[Counts]:
    """Start tokenizing a chunk; returns its counts as a future, already set without a pool or for a finished chunk."""
    if pool is not None and finished is None:
        # SIGINT is blocked while the worker starts: Python would print a traceback of its imports.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(encode_chunk, chunk, job)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    future: Future[Counts] = Future()
    future.set_result(finished or encode_chunk(chunk, job))
    return future


def _result(future: Future[Counts]) -> Counts:
    try:
        return future.result()
    except BrokenProcessPool as fault:
        raise DataError(
            "a worker process was killed, probably for lack of memory. Finished parts are kept: run the same command "
            "again with fewer --workers"
        ) from fault


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    """Start worker processes, or none for one worker. They are spawned: a fork beside the progress thread is unsafe."""
    if workers == 1:
        yield None
        return
    fresh = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=fresh, initializer=start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
