"""Tokenize one chunk of text into one shard: the work of a worker process of `prepare`.

A shard is a .bin/.idx pair, with --holdout also one of validation data, and a .json of its counts and of a checksum of
its pairs. The .json is written last. No file of a shard is synced to the disk: if the power fails, the checksum tells
a resumed run which shards are whole. The name of a shard is a digest of the text, the tokenizer and the options: a
resumed run finds exactly its own finished shards.
"""

import functools
import gc
import hashlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from titan_cpt.common.reading import is_absent, read_text
from titan_cpt.data.formats.indexed import count_tokens
from titan_cpt.data.formats.indexed_layout import open_binary, pair_paths
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.prepare.chunks import Chunk
from titan_cpt.data.prepare.json_lines import LongText
from titan_cpt.data.prepare.outputs import validation_prefix
from titan_cpt.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from titan_cpt.errors import DataError

LOST_CHARACTERS_RECORDED = 20
BATCH_CHARACTERS = 2**20  # characters that a worker tokenizes at a time; bounds its memory
CHECKED_BYTES = 2**20  # of a pair, read at a time for its checksum
SHARD_VERSION = 3  # increased when the same text and options give other tokens, or another format


@dataclass(frozen=True)
class TokenizeJob:
    """Options of tokenization: everything that determines a shard, except its text."""

    tokenizer: str
    fingerprint: str
    text_field: str
    holdout: float
    folder: Path
    """Folder of the shards until they are concatenated. Neither it nor the tokenizer's path affects the tokens."""
    add_bos: bool = False

    def shard_of(self, chunk: Chunk) -> Path:
        """Return the prefix of the shard of a loaded chunk."""
        recipe = json.dumps([SHARD_VERSION, self.fingerprint, self.text_field, self.holdout, self.add_bos]).encode()
        return self.folder / hashlib.blake2b(recipe + chunk.digest(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Counts:
    """Numbers of documents, tokens and UTF-8 bytes. Tokens include the begin- and end-of-document tokens.

    `held_out_*` counts validation data, the other fields training data.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    held_out_documents: int = 0
    held_out_tokens: int = 0
    held_out_bytes: int = 0
    empty_documents: int = 0
    lost_documents: int = 0
    lost_characters: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)
    """Count of each character without a token (it became the unknown token or was dropped), most frequent first."""

    def __add__(self, other: "Counts") -> "Counts":
        """Add field by field."""
        numbers = {
            key.name: getattr(self, key.name) + getattr(other, key.name) for key in fields(Counts) if key.name != "lost"
        }
        together = Counter(self.lost)
        together.update(other.lost)
        return Counts(**numbers, lost=dict(sorted(together.items(), key=lambda entry: (-entry[1], entry[0]))))

    def shortened(self) -> "Counts":
        """The same with the most frequent lost characters only, for PREFIX.json."""
        return replace(self, lost=dict([*self.lost.items()][:LOST_CHARACTERS_RECORDED]))


class Shard(NamedTuple):
    """A finished shard."""

    prefix: Path
    counts: Counts
    reused: bool
    """Whether an earlier run had finished it."""


def make_shard(chunk: Chunk, job: TokenizeJob) -> Shard:
    """Return the shard of a chunk, which is tokenized unless an earlier run finished it.

    Raises:
        DataError: a document is invalid; names file and line.
        AccessError: the shard exists but cannot be read.
    """
    loaded = chunk.loaded()
    prefix = job.shard_of(loaded)
    finished = finished_counts(prefix)
    return Shard(prefix, finished or encode_chunk(loaded, job), reused=finished is not None)


def finished_counts(shard: Path) -> Counts | None:
    """Return the counts of a finished shard; None if it does not exist, is incomplete or damaged.

    Raises:
        AccessError, DataError: the shard exists but cannot be read.
    """
    try:
        record = json.loads(read_text(Path(f"{shard}.json")))
        counts = Counts(**record["counts"])
        complete = count_tokens(shard) == counts.tokens
        if counts.held_out_documents:
            complete = complete and count_tokens(validation_prefix(shard)) == counts.held_out_tokens
        complete = complete and _checksum(_pairs(shard, record["holdout"])) == record["checksum"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    except DataError as error:
        if isinstance(error.__cause__, OSError) and not is_absent(error.__cause__):
            raise
        return None
    return counts if complete else None


def encode_chunk(chunk: Chunk, job: TokenizeJob) -> Counts:
    """Tokenize a loaded chunk into its shard.

    Raises:
        DataError: a document is invalid; names file and line.
    """
    tokenizer = _tokenizer(job)
    shard = job.shard_of(chunk)
    counts = Counts()
    with IndexedWriter(shard, tokenizer.vocab_size, durable=False) as train:
        if job.holdout:
            with IndexedWriter(validation_prefix(shard), tokenizer.vocab_size, durable=False) as validation:
                for batch in _batches(chunk, job.text_field):
                    counts += _write(batch, tokenizer, job.holdout, train, validation)
        else:
            for batch in _batches(chunk, job.text_field):
                counts += _write(batch, tokenizer, 0.0, train, train)
    checksum = _checksum(_pairs(shard, job.holdout))
    temporary = Path(f"{shard}.{os.getpid()}.json.tmp")
    record = {"counts": asdict(counts), "holdout": job.holdout, "checksum": checksum}
    temporary.write_text(json.dumps(record), encoding="utf-8")
    os.replace(temporary, f"{shard}.json")
    return counts


def share_tokenizer(tokenizer: Tokenizer) -> None:
    """Let this process, and processes that it forks afterwards, use an open tokenizer instead of opening it again."""
    _shared.clear()
    _shared[tokenizer.fingerprint, tokenizer.add_bos] = tokenizer


def start_worker() -> None:
    """Set up a worker process to exit at once on Ctrl-C, and when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # parallel.py blocks it while it starts the worker
    parent = parent_process()
    assert parent is not None, "start_worker is called in a child process"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker, also in the `tokenizers` library
    gc.freeze()  # a collection would write to the pages that a forked worker shares with its parent


def is_validation(text: bytes, holdout: float) -> bool:
    """Whether a document is validation data. A hash of its text decides, so duplicates are on the same side."""
    return _is_below(_holdout_hash(text), holdout)


def _holdout_hash(text: bytes = b"") -> "hashlib.blake2b":
    return hashlib.blake2b(text, digest_size=8, person=b"titan_cpt held")


def _is_below(digest: "hashlib.blake2b", holdout: float) -> bool:
    return int.from_bytes(digest.digest(), "big") < holdout * 2**64


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


_shared: dict[tuple[str, bool], Tokenizer] = {}


def _tokenizer(job: TokenizeJob) -> Tokenizer:
    return _shared.get((job.fingerprint, job.add_bos)) or _opened(job.tokenizer, job.fingerprint, job.add_bos)


@functools.lru_cache(maxsize=1)
def _opened(path: str, fingerprint: str, add_bos: bool) -> Tokenizer:
    """Load the tokenizer; raises DataError if the file changed since the run began."""
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{path}: changed since this run began; start the run again")
    return tokenizer.with_bos(add_bos)


def _pairs(shard: Path, holdout: float) -> list[Path]:
    """Return the prefixes of the pairs of a shard."""
    return [shard, validation_prefix(shard)] if holdout else [shard]


def _checksum(prefixes: Sequence[Path]) -> str:
    """Return a checksum of all files of some pairs."""
    digest = xxhash.xxh3_128()
    for path in (path for prefix in prefixes for path in pair_paths(prefix)):
        with open_binary(path) as file:
            while block := file.read(CHECKED_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _batches(chunk: Chunk, text_field: str) -> Iterator[tuple[list[str], list[bytes]] | LongText]:
    """Yield batches of about BATCH_CHARACTERS, as texts and as UTF-8; a LongText by itself."""
    texts: list[str] = []
    encoded: list[bytes] = []
    characters = 0
    for text, utf8 in chunk.texts(text_field):
        if not isinstance(text, LongText):
            texts.append(text)
            encoded.append(utf8)
            characters += len(text)
        if characters >= BATCH_CHARACTERS or isinstance(text, LongText):
            yield texts, encoded
            texts, encoded, characters = [], [], 0
        if isinstance(text, LongText):
            yield text
    yield texts, encoded


def _write(
    batch: tuple[list[str], list[bytes]] | LongText,
    tokenizer: Tokenizer,
    holdout: float,
    train: IndexedWriter,
    validation: IndexedWriter,
) -> Counts:
    """Tokenize a batch, and write each document to the training or the validation pair."""
    if isinstance(batch, LongText):
        return _write_long(batch, tokenizer, holdout, train, validation)
    texts, encoded = batch
    nonempty = [number for number, text in enumerate(texts) if text and not text.isspace()]
    tokens, sizes, lost = tokenizer.encode_documents(
        [texts[number] for number in nonempty], utf8=[encoded[number] for number in nonempty]
    )
    utf8_bytes = np.array([len(encoded[number]) for number in nonempty], dtype=np.int64)
    chosen = np.zeros(len(nonempty), dtype=np.bool_)
    if holdout:
        chosen[:] = [is_validation(encoded[number], holdout) for number in nonempty]
    if chosen.any():
        validation.add_documents(tokens[np.repeat(chosen, sizes)], sizes[chosen])
        train.add_documents(tokens[np.repeat(~chosen, sizes)], sizes[~chosen])
    else:
        train.add_documents(tokens, sizes)
    return _counted(chosen, sizes, utf8_bytes, empty_documents=len(texts) - len(nonempty), lost=lost)


def _write_long(
    text: LongText, tokenizer: Tokenizer, holdout: float, train: IndexedWriter, validation: IndexedWriter
) -> Counts:
    """The same for a text of many megabytes, which is decoded, hashed and tokenized in pieces."""
    digest = _holdout_hash()
    utf8_bytes = 0
    blank = True

    def pieces() -> Iterator[str]:
        nonlocal utf8_bytes, blank
        for piece in text.pieces():
            utf8 = piece.encode()
            digest.update(utf8)
            utf8_bytes += len(utf8)
            blank = blank and piece.isspace()
            yield piece

    tokens, sizes, lost = tokenizer.encode_pieces(pieces())
    if blank:
        return Counts(empty_documents=1)
    chosen = bool(holdout) and _is_below(digest, holdout)
    (validation if chosen else train).add_documents(tokens, sizes)
    return _counted(np.array([chosen]), sizes, np.array([utf8_bytes]), empty_documents=0, lost=lost)


def _counted(
    chosen: npt.NDArray[np.bool_],
    sizes: npt.NDArray[np.int64],
    utf8_bytes: npt.NDArray[np.int64],
    *,
    empty_documents: int,
    lost: Mapping[int, str],
) -> Counts:
    counted = Counter("".join(lost.values()))
    return Counts(
        *_totals(~chosen, sizes, utf8_bytes),
        *_totals(chosen, sizes, utf8_bytes),
        empty_documents=empty_documents,
        lost_documents=len(lost),
        lost_characters=counted.total(),
        lost=counted,
    )


def _totals(
    chosen: npt.NDArray[np.bool_], sizes: npt.NDArray[np.int64], utf8_bytes: npt.NDArray[np.int64]
) -> tuple[int, int, int]:
    """Return the numbers of documents, tokens and bytes of the chosen documents."""
    return int(chosen.sum()), int(sizes[chosen].sum()), int(utf8_bytes[chosen].sum())
