"""Tokenize text into a Megatron .bin/.idx pair: parallel, deterministic and resumable.

chunks.py cuts the inputs into chunks of documents, shards.py tokenizes each chunk into a shard in PREFIX.partial, and
the shards are concatenated in the order of the text, so the output does not depend on the number of processes. The pair
and PREFIX.json, which records how it was made, appear together or not at all. A run that was killed finds its finished
shards by the digest of their text.
"""

import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from titan_cpt.common.file_lock import exclusive
from titan_cpt.common.files import fsync, make_folder, write_bytes_atomically
from titan_cpt.common.reading import is_there
from titan_cpt.data.formats.indexed import count_tokens
from titan_cpt.data.formats.indexed_layout import pair_paths
from titan_cpt.data.formats.indexed_writer import concatenate, rename_pair
from titan_cpt.data.prepare.chunks import Chunk, read_chunks
from titan_cpt.data.prepare.outputs import (
    RECORD,
    has_finished_parts,
    partial_folder,
    recipe_of,
    refuse_inputs_in_the_way,
    remove_partial,
    replaceable,
    require_own_partial,
    validation_prefix,
)
from titan_cpt.data.prepare.progress import progress
from titan_cpt.data.prepare.provenance import read_record, record_path
from titan_cpt.data.prepare.shards import Counts, TokenizeJob, encode_chunk, finished_counts, start_worker
from titan_cpt.data.prepare.text_inputs import TextInput, find_inputs
from titan_cpt.data.tokenizer.diagnostics import tokenizer_notes
from titan_cpt.data.tokenizer.tokenizer import BYTES, Tokenizer, load_tokenizer
from titan_cpt.errors import ConfigError, DataError

CHUNKS_AHEAD = 2  # chunks in memory for each worker
RECIPE_VERSION = 1


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` has done."""

    output: Path
    """The path without .bin and .idx."""
    tokenizer: str
    """Name and size of the tokenizer."""
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
    def summary(self) -> str:
        """What was done, in a line; the note on a second one."""
        counts = self.counts
        parts = [f"{self.output}: {counts.documents:,} documents, {counts.tokens:,} tokens"]
        if counts.held_out_documents:
            held_out = f"{counts.held_out_documents:,} documents, {counts.held_out_tokens:,} tokens"
            parts.append(f"{validation_prefix(self.output)}: {held_out}")
        if counts.empty_documents:
            parts.append(f"{counts.empty_documents:,} empty documents left out")
        if self.reused_chunks:
            parts.append(f"{self.reused_chunks} of {self.chunks} parts were done already")
        parts.append(f"tokenizer: {self.tokenizer}")
        done = "already done, nothing was changed: " if self.already_done else ""
        notes = [note for note in (_loss_in_words(counts), self.note) if note]
        return done + "; ".join(parts) + "".join(f"\nnote: {note}" for note in notes)


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
    add_bos: bool = False,
) -> PrepareResult:
    """Tokenise text into OUTPUT.bin/.idx, and the held-out share of it into OUTPUT-validation.bin/.idx.

    Documents keep their order and end with the tokenizer's end-of-document token; those that are empty or nothing but
    white space are left out and counted. Whether a document is held out follows from its text alone.

    Args:
        inputs: files, globs, hub:NAME[:CONFIG[:SPLIT]]; see text_inputs.py.
        output: the path without .bin and .idx.
        tokenizer: "bytes", a tokenizer.json, or a folder that holds one.
        text_field: field or column of the text, where the format has fields.
        holdout: share of the documents in [0, 1) that is held out.
        workers: processes that tokenise; the result does not depend on it. More than one needs the main module of the
            program to be importable without doing anything (`if __name__ == "__main__"`).
        show_progress: a bar on stderr, if that is a terminal.
        force: replace an output that `prepare` made in another way.
        add_bos: begin every document with the tokenizer's begin-of-document token.

    Raises:
        ConfigError: an option is out of its range.
        DataError: an input is at fault or would be replaced, files in the way are not ours or were made in another
            way, or another process is writing the output. Nothing that was there is changed then.
        KeyboardInterrupt: with what is to be said of it; finished parts stay for the next attempt.
    """
    _check_options(holdout, workers, text_field)
    sources = _without_own_record(find_inputs(inputs), inputs, output)
    vocabulary = load_tokenizer(tokenizer).with_bos(add_bos)
    read = [Path(source.spec) for source in sources if not source.is_hub]
    refuse_inputs_in_the_way(output, [*read, *_file_of(vocabulary)])
    recipe = _recipe(sources, vocabulary, text_field, holdout)
    words = f"{vocabulary.name} ({vocabulary.vocab_size:,} ids)"
    done = None if force else _finished(output, recipe)
    if done is not None:
        with suppress(DataError):  # the run that made the output was killed as it cleared up
            require_own_partial(output)
            if partial_folder(output).exists():
                with _only_writer(output):
                    remove_partial(output)
        return PrepareResult(output, words, done, already_done=True, reused_chunks=0, chunks=0, note=None)
    replaceable(output, recipe, force=force)
    note = "\nnote: ".join(tokenizer_notes(vocabulary)) or None
    with _only_writer(output), _resumable(output):
        job = TokenizeJob(tokenizer, vocabulary.fingerprint, text_field, holdout, partial_folder(output), add_bos)
        shards, reused = _encode_all(sources, job, output, workers, show_progress=show_progress)
        counts = sum((part for _, part in shards), Counts())
        _check_sides(counts, holdout)
        record = {**recipe, "counts": asdict(counts.shortened())}
        _publish([shard for shard, _ in shards], output, job, vocabulary.vocab_size, record, force=force)
        remove_partial(output)
    return PrepareResult(output, words, counts, already_done=False, reused_chunks=reused, chunks=len(shards), note=note)


def _without_own_record(sources: Sequence[TextInput], inputs: Sequence[str], output: Path) -> list[TextInput]:
    """Leave out PREFIX.json where a glob such as data/*.json matches the record of this very output."""
    own, written_out = os.path.normpath(record_path(output)), set(inputs)
    return [
        source
        for source in sources
        if source.spec in written_out or os.path.normpath(source.spec) != own or not read_record(Path(own))
    ]


def _file_of(tokenizer: Tokenizer) -> list[Path]:
    """The file that a tokenizer is read from, which is an input too."""
    path = Path(tokenizer.name)
    return [] if tokenizer.name == BYTES else [path / "tokenizer.json" if path.is_dir() else path]


def _loss_in_words(counts: Counts) -> str | None:
    """How much of the text has no token, and which characters most."""
    if not counts.lost_characters:
        return None
    most = ", ".join(f"{character!r} {count:,}" for character, count in [*counts.lost.items()][:5])
    return (
        f"{counts.lost_characters:,} characters in {counts.lost_documents:,} documents have no token in this "
        "tokenizer: they became the unknown token or were left out, and no model can learn them. Most often: "
        f"{most} times"
    )


def _check_options(holdout: float, workers: int, text_field: str) -> None:
    if not 0 <= holdout < 1:
        raise ConfigError(f"--holdout: must be in [0, 1), got {holdout}; 0.05 holds out a twentieth of the documents")
    if workers < 1:
        raise ConfigError(f"--workers: must be 1 or more, got {workers}")
    if not text_field:
        raise ConfigError("--text-field: must name a field, got an empty name")


def _recipe(sources: Sequence[TextInput], tokenizer: Tokenizer, text_field: str, holdout: float) -> dict[str, Any]:
    """All that the output depends on, as PREFIX.json records it."""
    return {
        "version": RECIPE_VERSION,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        **({"add_bos": True} if tokenizer.add_bos else {}),
        "text_field": text_field,
        "holdout": holdout,
        "inputs": [source.identity() for source in sources],
    }


def _finished(output: Path, recipe: dict[str, Any]) -> Counts | None:
    """The counts of an output that is there and made in this way; None if there is none, or it is of another recipe.

    Raises:
        DataError: the output is damaged, or was changed after it was made.
    """
    record = read_record(record_path(output))
    needed = [*pair_paths(output), *(pair_paths(validation_prefix(output)) if recipe["holdout"] else ())]
    if record is None or recipe_of(record) != recipe or not all(is_there(path) for path in needed):
        return None  # what is missing is made again, with the rest
    known = {field.name for field in fields(Counts)}  # a record of an earlier version may lack some
    counts = Counts(**{key: value for key, value in record["counts"].items() if key in known})
    try:
        _check_length(output, counts.tokens)
        if recipe["holdout"]:
            _check_length(validation_prefix(output), counts.held_out_tokens)
    except DataError as fault:
        if isinstance(fault.__cause__, OSError):  # not damage
            raise
        raise DataError(f"{fault}. `titan-cpt prepare ... --force` makes it again from the same inputs") from fault
    return counts


def _check_length(prefix: Path, tokens: int) -> None:
    if (found := count_tokens(prefix)) != tokens:
        raise DataError(f"{prefix}.bin: {found} tokens; {tokens} were written: it was changed since")


@contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Hold a lock on the output for as long as the block runs; raises DataError if another process has it."""

    def held(by: str) -> DataError:
        return DataError(f"{output}: another process is preparing it now{by}; wait for it, or end it")

    require_own_partial(output)
    make_folder(partial_folder(output))
    with exclusive(partial_folder(output) / "lock", held=held):
        yield


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """Whatever ends the block: keep finished parts, from which the same command resumes, and nothing else."""
    try:
        yield
    except BaseException as fault:
        folder = partial_folder(output)
        kept = folder.is_dir() and has_finished_parts(output)
        if not kept or isinstance(fault, _NothingToPrepare):
            remove_partial(output)
            kept = False
        told = f"finished parts are kept in {folder}: the same command resumes from them" if kept else "nothing is kept"
        if isinstance(fault, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{output}: not prepared; {told}") from None
        if isinstance(fault, DataError) and kept:
            raise DataError(f"{fault} ({told[0].upper()}{told[1:]})") from fault.__cause__
        if isinstance(fault, _NothingToPrepare):
            raise DataError(str(fault)) from None
        if isinstance(fault, OSError) and fault.errno and fault.filename is None:  # of a write, such as on a full disk
            fault.filename = str(folder)
        raise


class _NothingToPrepare(DataError):
    """The inputs, read to their end, do not make an output: their parts are of no use to another attempt."""


def _encode_all(
    sources: Sequence[TextInput], job: TokenizeJob, output: Path, workers: int, *, show_progress: bool
) -> tuple[list[tuple[Path, Counts]], int]:
    """Make the shards that are not there yet; return all of them in the order of the text, and how many were there."""
    shards: list[tuple[Path, Counts]] = []
    pending: deque[tuple[int, Path, Future[Counts]]] = deque()
    reused = 0
    total_bytes = sum(source.disk_bytes for source in sources)
    with progress(output, total_bytes, show=show_progress) as advance, _pool(workers) as pool:

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
    """What a chunk will have come to; without a pool, or where it is finished, that is known at once."""
    if pool is not None and finished is None:
        # A worker that starts may not yet see Ctrl-C, which Python would answer with a traceback of its imports.
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


def _check_sides(counts: Counts, holdout: float) -> None:
    """Raise DataError if a side would be left without a document."""
    if not counts.documents + counts.held_out_documents:
        found = f"{counts.empty_documents:,} documents, all of them empty" if counts.empty_documents else "no document"
        raise _NothingToPrepare(f"the inputs hold no text: {found}")
    if not counts.documents or (holdout and not counts.held_out_documents):
        raise _NothingToPrepare(
            f"--holdout {holdout} puts {counts.held_out_documents} of "
            f"{counts.documents + counts.held_out_documents} documents on the held-out side, and both sides need one: "
            "change it, or give more documents"
        )


def _publish(
    shards: list[Path], output: Path, job: TokenizeJob, vocab_size: int, record: dict[str, Any], *, force: bool
) -> None:
    """Join the shards, then put everything in its place, OUTPUT.idx last: where that is, all of it is."""
    joined = job.folder / "joined"
    concatenate(shards, joined, vocab_size)
    if job.holdout:
        concatenate([validation_prefix(shard) for shard in shards], validation_prefix(joined), vocab_size)
    old = replaceable(output, recipe_of(record), force=force)  # again: tokenizing may have taken hours
    written = job.folder / RECORD
    write_bytes_atomically(written, (json.dumps(record, indent=2) + "\n").encode())
    for path in old:
        path.unlink(missing_ok=True)  # an .idx first: until the new one is whole there is none
    fsync(output.parent)
    if job.holdout:
        rename_pair(validation_prefix(joined), validation_prefix(output))
    os.replace(written, record_path(output))
    rename_pair(joined, output)
