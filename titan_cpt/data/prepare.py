"""Text to Megatron's .bin/.idx: in parallel, the same bytes from any number of processes, resumed where it stopped.

Inputs are cut into chunks (texts.py), each chunk becomes a shard of its own in PREFIX.partial (shards.py), and the
shards are joined in the order of the text. The pair, and a PREFIX.json that says how it was made, appear together or
not at all; a run that is killed and started again finds its finished shards by the digest of their text.
"""

import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from titan_cpt.data.indexed import count_tokens
from titan_cpt.data.indexed_format import pair_paths
from titan_cpt.data.indexed_writer import concatenate, flush_folder, rename_pair
from titan_cpt.data.shards import Counts, Job, encode_chunk, finished_counts, held_out_prefix, start_worker
from titan_cpt.data.texts import Chunk, Source, find_inputs, iterate_texts, missing_inputs, read_chunks
from titan_cpt.data.tokenizer import Tokenizer, load_tokenizer
from titan_cpt.errors import ConfigError, DataError
from titan_cpt.locks import exclusive
from titan_cpt.reading import is_there, read_text

__all__ = ["PrepareResult", "iterate_texts", "missing_inputs", "prepare"]

CHUNKS_AHEAD = 2  # chunks in memory for each worker
RECIPE_VERSION = 1


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` has done."""

    counts: Counts
    """Documents, tokens and bytes, held out and empty ones among them."""
    already_done: bool
    """Nothing was done: the output was there, made in the same way from the same inputs."""
    reused_chunks: int
    """Chunks that an interrupted run had finished."""
    chunks: int
    note: str | None
    """What the user should know about the tokenizer, if anything."""

    @property
    def in_words(self) -> str:
        """What was done, in a line; the note on a second one."""
        counts = self.counts
        parts = [f"{counts.documents:,} documents, {counts.tokens:,} tokens"]
        if counts.held_out_documents:
            parts.append(f"{counts.held_out_documents:,} held out, {counts.held_out_tokens:,} tokens")
        if counts.empty_documents:
            parts.append(f"{counts.empty_documents:,} empty ones left out")
        if self.reused_chunks:
            parts.append(f"{self.reused_chunks} of {self.chunks} parts were done already")
        done = "already there, made in this way: " if self.already_done else ""
        return done + "; ".join(parts) + (f"\nnote: {self.note}" if self.note else "")


def prepare(
    *,
    inputs: Sequence[str],
    output: Path,
    tokenizer: str,
    text_field: str = "text",
    holdout: float = 0.0,
    workers: int = 1,
    show_progress: bool = True,
    force: bool = False,
) -> PrepareResult:
    """Tokenise text into OUTPUT.bin/.idx, and the held-out share of it into OUTPUT-validation.bin/.idx.

    Documents keep their order and end with the tokenizer's end-of-document token; those that are empty or nothing but
    white space are left out and counted. Whether a document is held out follows from its text alone.

    Args:
        inputs: files, globs, hub:NAME[:CONFIG[:SPLIT]]; see texts.py.
        output: the path without .bin and .idx.
        tokenizer: "bytes", a tokenizer.json, or a folder that holds one.
        text_field: field or column of the text, where the format has fields.
        holdout: share of the documents in [0, 1) that is held out.
        workers: processes that tokenise; the result does not depend on it. More than one needs the main module of the
            program to be importable without doing anything (`if __name__ == "__main__"`).
        show_progress: a bar on stderr, if that is a terminal.
        force: replace an output that was made in another way.

    Raises:
        ConfigError: an option is out of its range.
        DataError: an input is at fault, an output made in another way is there, or another process is writing it.
    """
    _check_options(holdout, workers, text_field)
    sources = find_inputs(inputs)
    vocabulary = load_tokenizer(tokenizer)
    recipe = _recipe(sources, vocabulary, text_field, holdout)
    folder = Path(f"{output}.partial")
    done = _finished(output, recipe, force=force)
    if done is not None:
        if folder.exists():  # the run that made the output was killed as it cleared up
            with suppress(DataError), _only_writer(folder, output):
                shutil.rmtree(folder, ignore_errors=True)
        return PrepareResult(done, already_done=True, reused_chunks=0, chunks=0, note=None)
    note = vocabulary.note
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder, output):
        job = Job(tokenizer, vocabulary.fingerprint, text_field, holdout, folder)
        shards, reused = _encode_all(sources, job, workers, show_progress=show_progress)
        counts = sum((part for _, part in shards), Counts())
        _check_sides(counts, holdout)
        _publish(
            [shard for shard, _ in shards], output, job, vocabulary.vocab_size, {**recipe, "counts": asdict(counts)}
        )
    shutil.rmtree(folder)
    return PrepareResult(counts, already_done=False, reused_chunks=reused, chunks=len(shards), note=note)


def _check_options(holdout: float, workers: int, text_field: str) -> None:
    if not 0 <= holdout < 1:
        raise ConfigError(f"--holdout: must be in [0, 1), got {holdout}; 0.05 holds out a twentieth of the documents")
    if workers < 1:
        raise ConfigError(f"--workers: must be 1 or more, got {workers}")
    if not text_field:
        raise ConfigError("--text-field: must name a field, got an empty name")


def _recipe(sources: Sequence[Source], tokenizer: Tokenizer, text_field: str, holdout: float) -> dict[str, Any]:
    """All that the output depends on, as PREFIX.json records it."""
    return {
        "version": RECIPE_VERSION,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "text_field": text_field,
        "holdout": holdout,
        "inputs": [source.identity() for source in sources],
    }


def _finished(output: Path, recipe: dict[str, Any], *, force: bool) -> Counts | None:
    """The counts of an output that is there and made in this way; None if there is none, or it is to be replaced.

    Raises:
        DataError: another output is there, and `force` is off.
    """
    if force or not is_there(pair_paths(output)[1]):
        return None
    remedy = "Choose another --output, or replace it with --force"
    try:
        record = json.loads(read_text(_record_path(output)))
        counts = Counts(**record.pop("counts"))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{output}.idx: is there, and no {output}.json that says how it was made. {remedy}") from None
    if record != recipe:
        difference = "; ".join(_differences(record, recipe))
        raise DataError(f"{output}.idx: is there, made in another way: {difference}. {remedy}")
    _check_length(output, counts.tokens)
    if recipe["holdout"]:
        _check_length(held_out_prefix(output), counts.held_out_tokens)
    return counts


def _differences(was: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """Each key that differs, as found and as wanted; of the inputs the first that does."""
    for key in wanted:
        if was.get(key) == wanted[key]:
            continue
        if key != "inputs":
            yield f"{key} {was.get(key)} -> {wanted[key]}"
        elif len(was["inputs"]) != len(wanted["inputs"]):
            yield f"{len(was['inputs'])} inputs -> {len(wanted['inputs'])}"
        else:
            pairs = zip(was["inputs"], wanted["inputs"], strict=True)
            yield next(f"input {before} -> {now}" for before, now in pairs if before != now)


def _check_length(prefix: Path, tokens: int) -> None:
    if (found := count_tokens(prefix)) != tokens:
        raise DataError(f"{prefix}.bin: {found} tokens; {tokens} were written. Make it again with --force")


def _only_writer(folder: Path, output: Path) -> AbstractContextManager[None]:
    """Hold a lock on the output for as long as the block runs; raises DataError if another process has it."""

    def held(by: str) -> DataError:
        return DataError(f"{output}: another process is preparing it now{by}; wait for it, or end it")

    return exclusive(folder / "lock", held=held)


def _encode_all(
    sources: Sequence[Source], job: Job, workers: int, *, show_progress: bool
) -> tuple[list[tuple[Path, Counts]], int]:
    """Make the shards that are not there yet; return all of them in the order of the text, and how many were there."""
    shards: list[tuple[Path, Counts]] = []
    pending: deque[tuple[int, Path, Future[Counts]]] = deque()
    reused = 0
    with _progress(sum(source.disk_bytes for source in sources), show=show_progress) as advance, _pool(workers) as pool:

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


def _submit(pool: Executor | None, chunk: Chunk, job: Job, finished: Counts | None) -> Future[Counts]:
    """What a chunk will have come to; without a pool, or where it is finished, that is known at once."""
    if pool is not None and finished is None:
        return pool.submit(encode_chunk, chunk, job)
    future: Future[Counts] = Future()
    future.set_result(finished or encode_chunk(chunk, job))
    return future


def _result(future: Future[Counts]) -> Counts:
    try:
        return future.result()
    except BrokenProcessPool as fault:
        raise DataError(
            "a worker process was killed, most often for want of memory. What is finished is kept: start the same "
            "command again, with fewer --workers"
        ) from fault


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    """Worker processes; none for one worker. They start fresh: forking under the bar's thread is not safe."""
    if workers == 1:
        yield None
        return
    fresh = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=fresh, initializer=start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _progress(total_bytes: int, *, show: bool) -> Iterator[Callable[[int, Counts], None]]:
    """A bar over the bytes of the inputs on the disk; without a terminal there is none."""
    console = Console(stderr=True)
    columns = (TextColumn("tokenising"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    counted = TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens")
    hidden = not (show and console.is_terminal)
    with Progress(
        *columns, counted, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=hidden
    ) as progress:
        task = progress.add_task("", total=total_bytes or None, documents=0, tokens=0)
        so_far = Counts()

        def advance(disk_bytes: int, counts: Counts) -> None:
            nonlocal so_far
            so_far += counts
            documents = so_far.documents + so_far.held_out_documents
            tokens = so_far.tokens + so_far.held_out_tokens
            progress.update(task, advance=disk_bytes, documents=documents, tokens=tokens)

        yield advance


def _check_sides(counts: Counts, holdout: float) -> None:
    """Raise DataError if a side would be left without a document."""
    if not counts.documents + counts.held_out_documents:
        raise DataError(f"the inputs hold no text: {counts.empty_documents} documents, all of them empty")
    if not counts.documents or (holdout and not counts.held_out_documents):
        raise DataError(
            f"--holdout {holdout} puts {counts.held_out_documents} of "
            f"{counts.documents + counts.held_out_documents} documents on the held-out side, and both sides need one: "
            "change it, or give more documents"
        )


def _publish(shards: list[Path], output: Path, job: Job, vocab_size: int, record: dict[str, Any]) -> None:
    """Join the shards, then put everything in its place, OUTPUT.idx last: where that is, all of it is."""
    joined = job.folder / "joined"
    concatenate(shards, joined, vocab_size)
    if job.holdout:
        concatenate([held_out_prefix(shard) for shard in shards], held_out_prefix(joined), vocab_size)
    written = job.folder / "record.json"
    with open(written, "w") as file:
        file.write(json.dumps(record, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for old in (*pair_paths(output)[::-1], *pair_paths(held_out_prefix(output))[::-1], _record_path(output)):
        old.unlink(missing_ok=True)  # an .idx first: until the new one is whole there is none
    flush_folder(output.parent)
    if job.holdout:
        rename_pair(held_out_prefix(joined), held_out_prefix(output))
    os.replace(written, _record_path(output))
    rename_pair(joined, output)


def _record_path(output: Path) -> Path:
    return Path(f"{output}.json")
