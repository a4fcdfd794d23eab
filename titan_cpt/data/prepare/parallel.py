"""Tokenize all chunks into shards, in worker processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice

from titan_cpt.common.forked import may_fork
from titan_cpt.data.prepare.chunks import Chunk
from titan_cpt.data.prepare.shards import Shard, TokenizeJob, make_shard, share_tokenizer, start_worker
from titan_cpt.data.tokenizer.tokenizer import Tokenizer
from titan_cpt.errors import DataError

CHUNKS_AHEAD = 2  # chunks in memory for each worker


def encode_all(
    chunks: Iterator[Chunk],
    job: TokenizeJob,
    *,
    tokenizer: Tokenizer,
    workers: int,
    finished: Callable[[Chunk, Shard], None],
) -> list[Shard]:
    """Write the shards that do not exist yet, and return all in text order.

    Args:
        chunks: the documents.
        job: how to tokenize them.
        tokenizer: the open tokenizer of the job.
        workers: number of processes; one works in this process.
        finished: called with each chunk and its shard, in text order, while others are tokenized.

    Raises:
        DataError: a document is invalid, or a worker process was killed.
    """
    shards: list[Shard] = []
    pending: deque[tuple[Chunk, Future[Shard]]] = deque()
    first = [*islice(chunks, workers)]
    share_tokenizer(tokenizer)
    with _pool(min(workers, len(first))) as pool:

        def take_oldest() -> None:
            chunk, future = pending.popleft()
            shards.append(future.result())
            finished(chunk, shards[-1])

        for chunk in chain(first, chunks):
            pending.append((chunk, _submit(pool, chunk, job)))
            if len(pending) > CHUNKS_AHEAD * workers:
                take_oldest()
        while pending:
            take_oldest()
    return shards


def _submit(pool: Executor | None, chunk: Chunk, job: TokenizeJob) -> Future[Shard]:
    """Start tokenizing a chunk; returns its shard as a future, already set without a pool."""
    if pool is not None:
        with _sigint_blocked():
            return pool.submit(make_shard, chunk, job)
    future: Future[Shard] = Future()
    future.set_result(make_shard(chunk, job))
    return future


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    """Start worker processes, or none for one worker.

    They are forked, which takes milliseconds and shares the open tokenizer, if this process may fork. Otherwise they
    are spawned, and each opens the tokenizer itself.

    Raises:
        DataError: a worker process was killed.
    """
    if workers < 2:
        yield None
        return
    start = "fork" if may_fork() else "spawn"
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(start), initializer=start_worker)
    try:
        yield pool
    except BrokenProcessPool as fault:  # from a result, or from the next chunk's submission
        raise DataError(
            "a worker process was killed, probably for lack of memory. Finished parts are kept: run the same command "
            "again with fewer --workers"
        ) from fault
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT while a worker starts: Python would print a traceback of its imports."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
