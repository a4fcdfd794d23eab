"""Tokenize text into a Megatron .bin/.idx pair: parallel, deterministic and resumable.

chunks.py cuts the inputs into chunks of documents, shards.py tokenizes each chunk into a shard in PREFIX.partial, and
the shards are concatenated in the order of the text as they are finished, so the output does not depend on the number
of processes. The pair and PREFIX.json, which records how it was made, appear together or not at all. A run that was
killed finds its finished shards by the digest of their text.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from titan_cpt.common.file_lock import exclusive
from titan_cpt.common.files import fsync, make_folder, write_bytes_atomically
from titan_cpt.common.reading import is_there
from titan_cpt.data.formats.indexed import count_tokens
from titan_cpt.data.formats.indexed_layout import pair_paths
from titan_cpt.data.formats.indexed_writer import PairJoiner, rename_pair
from titan_cpt.data.prepare.chunks import Chunk, read_chunks
from titan_cpt.data.prepare.outputs import (
    RECORD,
    has_finished_parts,
    parts_folder,
    recipe_of,
    refuse_inputs_in_the_way,
    remove_partial,
    replaceable,
    require_own_partial,
    validation_prefix,
)
from titan_cpt.data.prepare.parallel import encode_all
from titan_cpt.data.prepare.progress import report_progress
from titan_cpt.data.prepare.provenance import read_record, record_path
from titan_cpt.data.prepare.shards import Counts, Shard, TokenizeJob
from titan_cpt.data.prepare.text_inputs import TextInput, find_inputs
from titan_cpt.data.tokenizer.diagnostics import tokenizer_notes
from titan_cpt.data.tokenizer.tokenizer import BYTES, Tokenizer, load_tokenizer
from titan_cpt.errors import ConfigError, DataError

RECIPE_VERSION = 1
JOINED = "joined"  # prefix of the output in the parts folder, until it is renamed


@dataclass(frozen=True)
class PrepareResult:
    """Result of `prepare`."""

    output: Path
    """The path without .bin and .idx."""
    tokenizer: str
    """Name and vocabulary size of the tokenizer."""
    counts: Counts
    """Numbers of documents, tokens and bytes, of training and validation data."""
    already_done: bool
    """The output existed already, made from the same inputs with the same options."""
    reused_chunks: int
    """Number of chunks that an interrupted run had finished."""
    chunks: int
    """Number of chunks of the inputs."""
    note: str | None
    """Notes on the tokenizer for the user, one a line; None without notes."""

    @property
    def summary(self) -> str:
        """The result as one line for the user; each note is a further line."""
        counts = self.counts
        parts = [f"{self.output}: {counts.documents:,} documents, {counts.tokens:,} tokens"]
        if counts.held_out_documents:
            validation = f"{counts.held_out_documents:,} documents, {counts.held_out_tokens:,} tokens"
            parts.append(f"{validation_prefix(self.output)}: {validation}")
        if counts.empty_documents:
            parts.append(f"{counts.empty_documents:,} empty documents skipped")
        if self.reused_chunks:
            parts.append(f"{self.reused_chunks} of {self.chunks} parts were finished by an earlier run")
        parts.append(f"tokenizer: {self.tokenizer}")
        done = "already prepared, nothing was changed: " if self.already_done else ""
        notes = [note for note in (_lost_characters_note(counts), self.note) if note]
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
    """Tokenize text into OUTPUT.bin/.idx, and a share of its documents into OUTPUT-validation.bin/.idx.

    Documents keep their order, and each ends with the tokenizer's end-of-document token. Empty documents and documents
    of only white space are skipped and counted. A hash of a document's text decides whether it is validation data.

    Args:
        inputs: files, globs, hub:NAME[:CONFIG[:SPLIT]]; see text_inputs.py.
        output: the path without .bin and .idx.
        tokenizer: "bytes", a tokenizer.json, or the folder of one.
        text_field: field or column of the text, for formats that have fields.
        holdout: share of the documents that become validation data, in [0, 1).
        workers: number of tokenizing processes; the output does not depend on it. More than one requires a main module
            that can be imported without side effects (`if __name__ == "__main__"`).
        show_progress: report progress on stderr.
        force: replace an output that `prepare` made from other inputs or with other options.
        add_bos: begin every document with the tokenizer's begin-of-document token.

    Raises:
        ConfigError: an option is out of range.
        DataError: an input is damaged or would be overwritten, an existing file was not written by `prepare` or with
            other options, or another process is writing the output. No existing file is changed then.
        KeyboardInterrupt: with a message for the user; finished parts are kept for the next run.
    """
    _check_options(holdout, workers, text_field)
    sources = _without_own_record(find_inputs(inputs), inputs, output)
    vocabulary = load_tokenizer(tokenizer).with_bos(add_bos)
    read = [Path(source.spec) for source in sources if not source.is_hub]
    refuse_inputs_in_the_way(output, [*read, *_file_of(vocabulary)])
    recipe = _recipe(sources, vocabulary, text_field, holdout)
    name = f"{vocabulary.name} ({vocabulary.vocab_size:,} ids)"
    done = None if force else _finished(output, recipe)
    if done is not None:
        _remove_leftovers(output)
        return PrepareResult(output, name, done, already_done=True, reused_chunks=0, chunks=0, note=None)
    replaceable(output, recipe, force=force)
    note = "\nnote: ".join(tokenizer_notes(vocabulary)) or None
    with _only_writer(output), _resumable(output):
        job = TokenizeJob(tokenizer, vocabulary.fingerprint, text_field, holdout, parts_folder(output), add_bos)
        with _joined(job, vocabulary.vocab_size) as append:
            shards = _make_shards(
                sources, job, vocabulary, append, output=output, workers=workers, show_progress=show_progress
            )
            counts = sum((shard.counts for shard in shards), Counts())
            _require_documents(counts, holdout, inputs)
        _publish(output, job, {**recipe, "counts": asdict(counts.shortened())}, force=force)
        remove_partial(output)
    reused = sum(shard.reused for shard in shards)
    return PrepareResult(output, name, counts, already_done=False, reused_chunks=reused, chunks=len(shards), note=note)


def _make_shards(
    sources: Sequence[TextInput],
    job: TokenizeJob,
    tokenizer: Tokenizer,
    append: Callable[[Path], None],
    *,
    output: Path,
    workers: int,
    show_progress: bool,
) -> list[Shard]:
    """Tokenize all inputs; each shard is appended to the output while later ones are tokenized."""
    total_bytes = sum(source.disk_bytes for source in sources)
    with report_progress(output, total_bytes, show=show_progress) as advance:

        def finished(chunk: Chunk, shard: Shard) -> None:
            append(shard.prefix)
            advance(chunk.disk_bytes, shard.counts)

        chunks = read_chunks(sources, job.text_field)
        return encode_all(chunks, job, tokenizer=tokenizer, workers=workers, finished=finished)


@contextmanager
def _joined(job: TokenizeJob, vocab_size: int) -> Iterator[Callable[[Path], None]]:
    """Write the pairs of the output in the parts folder; yields a function that appends a shard to them."""
    joined = job.folder / JOINED
    with ExitStack() as stack:
        train = stack.enter_context(PairJoiner(joined, vocab_size))
        if not job.holdout:
            yield train.append
            return
        validation = stack.enter_context(PairJoiner(validation_prefix(joined), vocab_size))

        def append(shard: Path) -> None:
            train.append(shard)
            validation.append(validation_prefix(shard))

        yield append


def _remove_leftovers(output: Path) -> None:
    """Remove the parts that remain if an earlier run was killed after it had written the output."""
    with suppress(DataError):
        require_own_partial(output)
        if parts_folder(output).exists():
            with _only_writer(output):
                remove_partial(output)


def _without_own_record(sources: Sequence[TextInput], inputs: Sequence[str], output: Path) -> list[TextInput]:
    """Remove PREFIX.json from the inputs if a glob such as data/*.json matched the record of this output."""
    own = os.path.normpath(record_path(output))
    literal_names = set(inputs)
    return [
        source
        for source in sources
        if source.spec in literal_names or os.path.normpath(source.spec) != own or not read_record(Path(own))
    ]


def _file_of(tokenizer: Tokenizer) -> list[Path]:
    """The tokenizer's own file, which is an input as well."""
    path = Path(tokenizer.name)
    return [] if tokenizer.name == BYTES else [path / "tokenizer.json" if path.is_dir() else path]


def _lost_characters_note(counts: Counts) -> str | None:
    """How many characters have no token, and the most frequent ones."""
    if not counts.lost_characters:
        return None
    most = ", ".join(f"{character!r} {count:,}" for character, count in [*counts.lost.items()][:5])
    return (
        f"{counts.lost_characters:,} characters in {counts.lost_documents:,} documents have no token in this "
        "tokenizer: they became the unknown token or were dropped, so no model can learn them. Most frequent: "
        f"{most} times"
    )


def _check_options(holdout: float, workers: int, text_field: str) -> None:
    if not 0 <= holdout < 1:
        raise ConfigError(
            f"--holdout: must be in [0, 1), got {holdout}; 0.05 takes 5 % of the documents for validation"
        )
    if workers < 1:
        raise ConfigError(f"--workers: must be 1 or more, got {workers}")
    if not text_field:
        raise ConfigError("--text-field: must name a field, got an empty name")


def _recipe(sources: Sequence[TextInput], tokenizer: Tokenizer, text_field: str, holdout: float) -> dict[str, Any]:
    """Everything that determines the output, as PREFIX.json records it."""
    return {
        "version": RECIPE_VERSION,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        **({"add_bos": True} if tokenizer.add_bos else {}),
        "text_field": text_field,
        "holdout": holdout,
        "inputs": [source.identity() for source in sources],
    }


def _finished(output: Path, recipe: dict[str, Any]) -> Counts | None:
    """Return the counts of the output if it exists and was made with this recipe, otherwise None.

    Raises:
        DataError: the output is damaged, or was changed after it was written.
    """
    record = read_record(record_path(output))
    needed = [*pair_paths(output), *(pair_paths(validation_prefix(output)) if recipe["holdout"] else ())]
    if record is None or recipe_of(record) != recipe or not all(is_there(path) for path in needed):
        return None  # if one file is missing, all are made again
    known = {field.name for field in fields(Counts)}  # an earlier version may not have recorded all of them
    counts = Counts(**{key: value for key, value in record["counts"].items() if key in known})
    try:
        _check_length(output, counts.tokens)
        if recipe["holdout"]:
            _check_length(validation_prefix(output), counts.held_out_tokens)
    except DataError as fault:
        if isinstance(fault.__cause__, OSError):  # unreadable, which is not damage
            raise
        raise DataError(f"{fault}. `titan-cpt prepare ... --force` makes it again from the same inputs") from fault
    return counts


def _check_length(prefix: Path, tokens: int) -> None:
    if (found := count_tokens(prefix)) != tokens:
        raise DataError(f"{prefix}.bin: {found} tokens, but {tokens} were written: it was changed afterwards")


@contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Lock the output during the block; raises DataError if another process holds the lock."""

    def held(by: str) -> DataError:
        return DataError(f"{output}: another process is preparing it now{by}; wait for it, or end it")

    require_own_partial(output)
    make_folder(parts_folder(output))
    with exclusive(parts_folder(output) / "lock", held=held):
        yield


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """If the block raises, keep the finished parts, from which the same command resumes, and remove everything else."""
    try:
        yield
    except BaseException as fault:
        folder = parts_folder(output)
        kept = folder.is_dir() and has_finished_parts(output)
        if not kept or isinstance(fault, _NothingToPrepare):
            remove_partial(output)
            kept = False
        resumes = f"finished parts are kept in {folder}: the same command resumes from them"
        message = resumes if kept else "nothing is kept"
        if isinstance(fault, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{output}: not prepared; {message}") from None
        if isinstance(fault, DataError) and kept:
            raise DataError(f"{fault} ({message[0].upper()}{message[1:]})") from fault.__cause__
        if isinstance(fault, _NothingToPrepare):
            raise DataError(str(fault)) from None
        if isinstance(fault, OSError) and fault.errno and fault.filename is None:  # a write, such as on a full disk
            fault.filename = str(folder)
        raise


class _NothingToPrepare(DataError):
    """The complete inputs do not make an output, so their parts are of no use to another run."""


def _require_documents(counts: Counts, holdout: float, inputs: Sequence[str]) -> None:
    """Raise DataError if the training or the validation data would have no document."""
    if not counts.documents + counts.held_out_documents:
        empty = counts.empty_documents
        found = f"{empty:,} document{'s' if empty > 1 else ''}, all empty" if empty else "no document"
        raise _NothingToPrepare(f"{', '.join(map(str, inputs))}: no text: {found}. Give files that contain text")
    if not counts.documents or (holdout and not counts.held_out_documents):
        raise _NothingToPrepare(
            f"--holdout {holdout} makes {counts.held_out_documents} of "
            f"{counts.documents + counts.held_out_documents} documents validation data, but training and validation "
            "need at least one each: change it, or use more documents (a .txt file is one, and so is each line of a "
            ".jsonl file)"
        )


def _publish(output: Path, job: TokenizeJob, record: dict[str, Any], *, force: bool) -> None:
    """Rename the joined pairs, OUTPUT.idx last: if it exists, the whole output does."""
    joined = job.folder / JOINED
    old = replaceable(output, recipe_of(record), force=force)  # checked again: tokenizing may have taken hours
    written = job.folder / RECORD
    write_bytes_atomically(written, (json.dumps(record, indent=2) + "\n").encode())
    for path in old:
        path.unlink(missing_ok=True)  # the .idx first: there is none until the new pair is complete
    fsync(output.parent)
    if job.holdout:
        rename_pair(validation_prefix(joined), validation_prefix(output))
    os.replace(written, record_path(output))
    rename_pair(joined, output)
