"""One chunk of text to one shard of tokens: what a worker process of `prepare` does, and how it is kept.

A shard is a .bin/.idx pair (two with a hold-out) and a .json of its counts, written last: where that is, the shard is
whole. Its name is a digest of the text, the tokenizer and the options, so that an interrupted run finds what it has
done and nothing else.
"""

import functools
import hashlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titan_cpt.common.reading import is_absent, read_text
from titan_cpt.data.formats.indexed import count_tokens
from titan_cpt.data.formats.indexed_writer import IndexedWriter
from titan_cpt.data.prepare.chunks import Chunk
from titan_cpt.data.prepare.outputs import validation_prefix
from titan_cpt.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from titan_cpt.errors import DataError

MOST_LOST = 20
BATCH_CHARACTERS = 2**20  # of text at a time: bounds the memory of a worker
LAYOUT = 2  # goes up when shards of the same text and options would hold other tokens


@dataclass(frozen=True)
class TokenizeJob:
    """How text becomes tokens; all that a shard depends on besides its text."""

    tokenizer: str
    fingerprint: str
    text_field: str
    holdout: float
    folder: Path
    """Where shards lie until they are joined; the tokens do not depend on it, nor on the tokenizer's path."""
    add_bos: bool = False

    def shard_of(self, chunk: Chunk) -> Path:
        """Prefix of the shard that holds this chunk."""
        recipe = json.dumps([LAYOUT, self.fingerprint, self.text_field, self.holdout, self.add_bos]).encode()
        return self.folder / hashlib.blake2b(recipe + chunk.digest(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Counts:
    """What was read and written. Bytes are those of the texts in UTF-8; tokens include the end of each document."""

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
    """Characters without a token (they became the unknown token, or nothing) to how often, the most frequent first."""

    def __add__(self, other: "Counts") -> "Counts":
        """Field by field."""
        numbers = {
            key.name: getattr(self, key.name) + getattr(other, key.name) for key in fields(Counts) if key.name != "lost"
        }
        together = Counter(self.lost)
        together.update(other.lost)
        return Counts(**numbers, lost=dict(sorted(together.items(), key=lambda entry: (-entry[1], entry[0]))))

    def shortened(self) -> "Counts":
        """The same with the MOST_LOST most frequent lost characters only, for PREFIX.json."""
        return replace(self, lost=dict([*self.lost.items()][:MOST_LOST]))


def finished_counts(shard: Path) -> Counts | None:
    """The counts of a whole shard, None if it is not there or not as it was written.

    Raises:
        AccessError, DataError: it is there and the system does not let it be read.
    """
    try:
        counts = Counts(**json.loads(read_text(Path(f"{shard}.json"))))
        whole = count_tokens(shard) == counts.tokens
        if counts.held_out_documents:
            whole = whole and count_tokens(validation_prefix(shard)) == counts.held_out_tokens
    except (FileNotFoundError, ValueError, TypeError):
        return None
    except DataError as error:
        if isinstance(error.__cause__, OSError) and not is_absent(error.__cause__):
            raise
        return None
    return counts if whole else None


def encode_chunk(chunk: Chunk, job: TokenizeJob) -> Counts:
    """Write the shard of a chunk.

    Raises:
        DataError: a document is at fault; names file and line.
    """
    tokenizer = _tokenizer(job.tokenizer, job.fingerprint, job.add_bos)
    shard = job.shard_of(chunk)
    counts = Counts()
    with IndexedWriter(shard, tokenizer.vocab_size) as train:
        if job.holdout:
            with IndexedWriter(validation_prefix(shard), tokenizer.vocab_size) as held_out:
                for texts, encoded in _batches(chunk, job.text_field):
                    counts += _write(texts, encoded, tokenizer, job.holdout, train, held_out)
        else:
            for texts, encoded in _batches(chunk, job.text_field):
                counts += _write(texts, encoded, tokenizer, 0.0, train, train)
    temporary = Path(f"{shard}.{os.getpid()}.json.tmp")
    temporary.write_text(json.dumps(asdict(counts)), encoding="utf-8")
    os.replace(temporary, f"{shard}.json")
    return counts


def start_worker() -> None:
    """Make a worker process end with its parent: at once on Ctrl-C, and when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked while the parent starts it: see prepare.py
    parent = parent_process()
    assert parent is not None, "start_worker is called in a child process"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def is_held_out(text: bytes, holdout: float) -> bool:
    """Whether a document goes to the held-out side: told by its text alone, so that duplicates stay together."""
    digest = hashlib.blake2b(text, digest_size=8, person=b"titan_cpt held").digest()
    return int.from_bytes(digest, "big") < holdout * 2**64


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, fingerprint: str, add_bos: bool) -> Tokenizer:
    """The tokenizer with this content; the file at the path may have become another one."""
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{path}: changed since this run began; start it again")
    return tokenizer.with_bos(add_bos)


def _batches(chunk: Chunk, text_field: str) -> Iterator[tuple[list[str], list[bytes]]]:
    """Documents in lots of about BATCH_CHARACTERS, as text and as UTF-8."""
    texts: list[str] = []
    encoded: list[bytes] = []
    characters = 0
    for text, utf8 in chunk.texts(text_field):
        texts.append(text)
        encoded.append(utf8)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield texts, encoded
            texts, encoded, characters = [], [], 0
    yield texts, encoded


def _write(
    texts: list[str],
    encoded: list[bytes],
    tokenizer: Tokenizer,
    holdout: float,
    train: IndexedWriter,
    held_out: IndexedWriter,
) -> Counts:
    """Tokenise one lot, and write each document to its side."""
    kept = [number for number, text in enumerate(texts) if text and not text.isspace()]
    tokens, sizes, lost = tokenizer.encode_documents([texts[number] for number in kept])
    utf8_bytes = np.array([len(encoded[number]) for number in kept], dtype=np.int64)
    held = np.array([is_held_out(encoded[number], holdout) for number in kept], dtype=np.bool_)
    train.add_documents(tokens[np.repeat(~held, sizes)], sizes[~held])
    held_out.add_documents(tokens[np.repeat(held, sizes)], sizes[held])
    counted = Counter("".join(lost.values()))
    return Counts(
        *_side(~held, sizes, utf8_bytes),
        *_side(held, sizes, utf8_bytes),
        empty_documents=len(texts) - len(kept),
        lost_documents=len(lost),
        lost_characters=counted.total(),
        lost=counted,
    )


def _side(
    chosen: npt.NDArray[np.bool_], sizes: npt.NDArray[np.int64], utf8_bytes: npt.NDArray[np.int64]
) -> tuple[int, int, int]:
    """Documents, tokens and bytes of those chosen."""
    return int(chosen.sum()), int(sizes[chosen].sum()), int(utf8_bytes[chosen].sum())
