"""Read text inputs as chunks of documents. Chunk borders depend only on the inputs, not on the machine.

JSON lines stay bytes until a worker parses them. Of an uncompressed local file, a chunk names only its range of bytes,
which the worker reads itself; the main process then reads a few kilobytes per chunk. JSON and parquet files of a
Hugging Face dataset are read like local ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash

from titan_cpt.data.prepare import hub
from titan_cpt.data.prepare.decompress import COMPRESSED_SUFFIXES, decompressed_blocks, read_blocks
from titan_cpt.data.prepare.json_lines import (
    BYTE_ORDER_MARK,
    CHOOSE_FIELD,
    LongText,
    field_of_lines,
    parsed,
    record_field,
    short,
)
from titan_cpt.data.prepare.text_inputs import TextInput, file_kind, find_inputs
from titan_cpt.errors import DataError, reason_and_remedy

CHUNKS_PER_FILE = 64  # about, of a large file; an interrupted run keeps the chunks that are finished
SMALLEST_CHUNK_BYTES = 2 * 2**20
LARGEST_CHUNK_BYTES = 32 * 2**20
PARQUET_ROWS = 1024
SEARCHED_BYTES = 2**16  # read at a time to find the end of a line
COUNTED_BYTES = 2**24  # read at a time to count lines


class FileRange(NamedTuple):
    """Bytes [start, stop) of a file."""

    path: str
    start: int
    stop: int

    def blocks(self, block_bytes: int) -> Iterator[bytes]:
        """Yield the bytes in blocks.

        Raises:
            DataError: the file cannot be read, or has become shorter.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start)
                remaining = self.stop - self.start
                while remaining:
                    block = file.read(min(remaining, block_bytes))
                    if not block:
                        raise DataError(f"{self.path}: became shorter while it was read; start the run again")
                    remaining -= len(block)
                    yield block
        except OSError as fault:
            raise DataError(f"{self.path}: cannot be read: {reason_and_remedy(fault)}") from fault


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents: unparsed JSON lines, or texts."""

    where: str
    """The file or dataset, for messages."""
    unit: str
    """"line" or "row", for messages."""
    first: int
    """Number of the first line or row, from 1; after a range of the file, counted from the end of that range."""
    content: bytes | tuple[Any, ...] | FileRange
    """JSON lines, as bytes or where to read them, or texts."""
    disk_bytes: int = field(compare=False, default=0)
    """Bytes of the input files that this chunk accounts for, for progress."""
    before: FileRange | None = None
    """The range of the file before this chunk; its lines are counted only if a message needs the number."""

    def loaded(self) -> Chunk:
        """Return the chunk with its content in memory.

        Raises:
            DataError: the file cannot be read, or has become shorter.
        """
        if not isinstance(self.content, FileRange):
            return self
        blocks = [*self.content.blocks(self.content.stop - self.content.start)]
        return replace(self, content=blocks[0] if len(blocks) == 1 else b"".join(blocks))

    def digest(self) -> bytes:
        """Return a digest of the content of a loaded chunk, independent of the file name."""
        digest = xxhash.xxh3_128()
        if isinstance(self.content, bytes):
            digest.update(b"lines\0")
            digest.update(self.content)
        else:
            digest.update(json.dumps(self.content, default=repr).encode())
        return digest.digest()

    def texts(self, text_field: str) -> Iterator[tuple[str | LongText, bytes]]:
        """Yield each text of a loaded chunk, as str and as UTF-8; a LongText without its UTF-8.

        Raises:
            DataError: a line is not a JSON object or lacks the field, or a text is not a valid string; names file and
                line.
        """
        for position, text in self._values(text_field):
            if isinstance(text, LongText):
                yield text, b""
                continue
            if not isinstance(text, str):
                raise DataError(f"{self._place(position)}: {text_field!r} is {short(text)}; allowed is a string")
            try:
                yield text, text.encode()
            except UnicodeEncodeError as fault:
                raise DataError(
                    f"{self._place(position)}: the text contains {text[fault.start]!r}, half of a surrogate pair and "
                    "not a character: correct or remove it"
                ) from None

    def _values(self, text_field: str) -> Iterator[tuple[int, Any]]:
        """Yield the position and the text field of each document, whatever its type."""
        if isinstance(self.content, bytes):
            return field_of_lines(self.content, text_field, self._place)
        return enumerate(self.content)

    def _place(self, position: int) -> str:
        """Return file and line, or row, of the document at a position of the chunk, for messages."""
        number = self.first + position
        if self.before is not None:
            number += sum(block.count(b"\n") for block in self.before.blocks(COUNTED_BYTES))
        return f"{self.where}:{number}" if self.unit == "line" else f"{self.where}: {self.unit} {number}"


def iterate_texts(inputs: Sequence[str], text_field: str = "text") -> Iterator[str]:
    """Yield the text of every document, in order, except those of only white space.

    Raises:
        DataError: see find_inputs and Chunk.texts.
    """
    for chunk in read_chunks(find_inputs(inputs), text_field):
        for text, _ in chunk.loaded().texts(text_field):
            whole = "".join(text.pieces()) if isinstance(text, LongText) else text
            if whole and not whole.isspace():
                yield whole


def read_chunks(sources: Sequence[TextInput], text_field: str) -> Iterator[Chunk]:
    """Yield all documents in order, as chunks whose borders depend only on the inputs.

    Raises:
        DataError: an input is damaged, or its content does not match its suffix.
    """
    texts: list[str] = []  # .txt files are collected into shared chunks
    size = 0
    for source in sources:
        if file_kind(source.spec) == ".txt":
            text, length = _read_text(Path(source.spec))
            texts.append(text)
            size += length
        if texts and (size >= SMALLEST_CHUNK_BYTES or file_kind(source.spec) != ".txt"):
            yield Chunk("text files", "file", 1, tuple(texts), size)
            texts, size = [], 0
        if file_kind(source.spec) != ".txt":
            yield from _read_source(source, text_field)
    if texts:
        yield Chunk("text files", "file", 1, tuple(texts), size)


def _read_source(source: TextInput, text_field: str) -> Iterator[Chunk]:
    if source.is_hub:
        return _read_hub(source.spec, text_field)
    path = Path(source.spec)
    target = _chunk_bytes(source.disk_bytes)
    if path.suffix == ".parquet":
        return _cut_values(source.spec, _parquet_values(path, source.spec, text_field), target, source.disk_bytes)
    return _read_json(read_blocks(path), source.spec, text_field, target, source.disk_bytes, local=path)


def _read_hub(spec: str, text_field: str) -> Iterator[Chunk]:
    """Read JSON and parquet files directly, one by one, and other formats through the `datasets` library."""
    split = hub.open_split(spec)
    if split.format not in ("json", "parquet"):
        values = _fields(hub.stream_rows(spec, split, text_field), text_field, spec)
        yield from _cut_values(spec, values, LARGEST_CHUNK_BYTES, 0)
        return
    for name in split.files:
        try:
            with hub.open_file(name) as file:
                if split.format == "parquet":
                    yield from _cut_values(name, _parquet_values(file, name, text_field), LARGEST_CHUNK_BYTES, 0)
                else:
                    blocks = decompressed_blocks(file, hub.base_name(name))
                    yield from _read_json(blocks, name, text_field, LARGEST_CHUNK_BYTES, 0, list_field=split.field)
        except OSError as fault:
            raise DataError(f"{spec}: {name} cannot be read: {reason_and_remedy(fault)}") from fault


def _chunk_bytes(disk_bytes: int) -> int:
    return min(max(disk_bytes // CHUNKS_PER_FILE, SMALLEST_CHUNK_BYTES), LARGEST_CHUNK_BYTES)


def _read_text(path: Path) -> tuple[str, int]:
    """Return the text of a file without its byte order mark, and its length on disk."""
    content = b"".join(block for block, _ in read_blocks(path))
    _refuse_utf16(content, str(path))
    try:
        return content.decode("utf-8-sig"), path.stat().st_size
    except UnicodeDecodeError as fault:
        line = content[: fault.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: byte {content[fault.start]:#04x} is not UTF-8; convert the file") from None


def _refuse_utf16(content: bytes, place: str) -> None:
    """Raise DataError for UTF-16: it has a byte order mark, or, for Latin text, every second byte is 0."""
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    if marked or (len(content) > 1 and 3 * content.count(0) > len(content)):
        raise DataError(f"{place}: looks like UTF-16; convert it to UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW")


def _read_json(
    blocks: Iterator[tuple[bytes, int]],
    where: str,
    text_field: str,
    target: int,
    disk_bytes: int,
    *,
    list_field: str | None = None,
    local: Path | None = None,
) -> Iterator[Chunk]:
    """Read JSON lines, or one JSON array if a .json begins with [; an array is loaded into memory completely.

    Args:
        blocks: blocks of the decompressed file, with the position on disk.
        where: the file, for messages.
        text_field: field of the text.
        target: bytes of a chunk.
        disk_bytes: length of the file on disk.
        list_field: field with the array, if the file is one object.
        local: the file, if it is a local one.
    """
    head = list(_take_until_content(blocks))
    begin = b"".join(block for block, _ in head).removeprefix(BYTE_ORDER_MARK).lstrip()
    _refuse_utf16(begin[:100], where)
    may_be_array = not where.endswith(tuple(f".jsonl{packing}" for packing in ("", *COMPRESSED_SUFFIXES)))
    if list_field is not None or (may_be_array and begin.startswith(b"[")):
        records = parsed(b"".join(block for block, _ in (*head, *blocks)), lambda: where)
        if list_field is not None:
            records = record_field(records, list_field, lambda: where)
        if not isinstance(records, list):
            raise DataError(f"{where}: {list_field!r} is {short(records)}; allowed is a list of objects")
        return _cut_values(where, _fields(records, text_field, where), target, disk_bytes)
    if local is not None and local.suffix not in COMPRESSED_SUFFIXES:
        return _cut_file(where, target)
    return _cut_lines(where, chain(head, blocks), target)


def _take_until_content(blocks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    for block in blocks:
        yield block
        if block[0].strip():
            return


def _cut_lines(where: str, blocks: Iterator[tuple[bytes, int]], target: int) -> Iterator[Chunk]:
    """Cut chunks after the last line end within `target` bytes, or, in a longer line, after its end."""
    buffer = bytearray()
    begun = False
    first, position, reported, searched = 1, 0, 0, 0
    for block, position in blocks:
        buffer += block
        if not begun:
            if BYTE_ORDER_MARK.startswith(buffer) and len(buffer) < len(BYTE_ORDER_MARK):
                continue  # the block may end inside of the mark
            begun = True
            buffer = buffer.removeprefix(BYTE_ORDER_MARK)
        while len(buffer) > target:
            cut = buffer.rfind(b"\n", 0, target) + 1 or buffer.find(b"\n", searched) + 1
            if not cut:
                searched = len(buffer)
                break
            content = bytes(buffer[:cut])
            del buffer[:cut]
            yield Chunk(where, "line", first, content, position - reported)
            first, reported, searched = first + content.count(b"\n"), position, 0
    if buffer.strip():
        yield Chunk(where, "line", first, bytes(buffer), position - reported)


def _cut_file(where: str, target: int) -> Iterator[Chunk]:
    """Cut an uncompressed file as `_cut_lines` cuts its content, and read only the ends of its chunks."""
    try:
        with open(where, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = len(BYTE_ORDER_MARK) if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0
            while size - start > target:
                stop = _last_line_end(file, start, start + target) or _next_line_end(file, start + target)
                if not stop:
                    break
                yield Chunk(where, "line", 1, FileRange(where, start, stop), stop - start, FileRange(where, 0, start))
                start = stop
            rest = FileRange(where, start, size)
            if any(block.strip() for block in rest.blocks(COUNTED_BYTES)):
                yield Chunk(where, "line", 1, rest, size - start, FileRange(where, 0, start))
    except OSError as fault:
        raise DataError(f"{where}: cannot be read: {reason_and_remedy(fault)}") from fault


def _last_line_end(file: IO[bytes], start: int, stop: int) -> int:
    """Return the position after the last line end of bytes [start, stop); 0 without one."""
    while stop > start:
        begin = max(start, stop - SEARCHED_BYTES)
        file.seek(begin)
        found = file.read(stop - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        stop = begin
    return 0


def _next_line_end(file: IO[bytes], start: int) -> int:
    """Return the position after the first line end at or after `start`; 0 without one."""
    file.seek(start)
    while block := file.read(SEARCHED_BYTES):
        found = block.find(b"\n")
        if found >= 0:
            return start + found + 1
        start += len(block)
    return 0


def _cut_values(where: str, values: Iterator[Any], target: int, disk_bytes: int) -> Iterator[Chunk]:
    """Cut chunks of about `target` characters; the last one accounts for all of the file's bytes on disk."""
    pending: list[Any] = []
    first, size = 1, 0
    for value in values:
        pending.append(value)
        size += len(value) if isinstance(value, str) else 1
        if size >= target:
            yield Chunk(where, "row", first, tuple(pending))
            first, size, pending = first + len(pending), 0, []
    if pending or disk_bytes:
        yield Chunk(where, "row", first, tuple(pending), disk_bytes)


def _fields(records: Iterable[Any], name: str, where: str) -> Iterator[Any]:
    """Yield a field of each record of a file or dataset."""
    for row, record in enumerate(records, 1):
        yield record_field(record, name, partial("{}: row {}".format, where, row))


def _parquet_values(file: Path | IO[bytes], where: str, text_field: str) -> Iterator[Any]:
    """Yield the text column of a parquet file, row by row."""
    import pyarrow  # imported here: heavy, and most inputs are not parquet
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if text_field not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise DataError(
                    f"{where}: no column {text_field!r}; its columns are {columns}: choose one with {CHOOSE_FIELD}"
                )
            if table.schema_arrow.names.count(text_field) > 1:
                raise DataError(f"{where}: has several columns {text_field!r}: rename or remove all except one")
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError) as fault:
        raise DataError(f"{where}: cannot be read as parquet: {fault}") from fault
