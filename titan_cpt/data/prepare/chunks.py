"""Read text inputs as chunks of documents. Chunk borders depend only on the inputs, not on the machine.

JSON lines stay bytes until a worker parses them: parsing is the slow part, so it runs in parallel. JSON and parquet
files of a Hugging Face dataset are read like local ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

from titan_cpt.data.prepare import hub
from titan_cpt.data.prepare.decompress import COMPRESSED_SUFFIXES, decompressed_blocks, read_blocks
from titan_cpt.data.prepare.text_inputs import TextInput, file_kind, find_inputs
from titan_cpt.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHOOSE_FIELD = "--text-field NAME (in a config: source.text_field)"
CHUNKS_PER_FILE = 64  # about, of a large file; an interrupted run keeps the chunks that are finished
SMALLEST_CHUNK_BYTES = 2 * 2**20
LARGEST_CHUNK_BYTES = 32 * 2**20
PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents: unparsed JSON lines, or texts."""

    where: str
    """The file or dataset, for messages."""
    unit: str
    """"line" or "row", for messages."""
    first: int
    """Number of the first line or row, from 1."""
    content: bytes | tuple[Any, ...]
    disk_bytes: int = field(compare=False, default=0)
    """Bytes of the input files that this chunk accounts for, for progress."""

    def digest(self) -> bytes:
        """Return a digest of the content, independent of the file name."""
        digest = hashlib.blake2b(digest_size=32)
        if isinstance(self.content, bytes):
            digest.update(b"lines\0" + self.content)
        else:
            digest.update(json.dumps(self.content, default=repr).encode())
        return digest.digest()

    def texts(self, text_field: str) -> Iterator[tuple[str, bytes]]:
        """Yield each text, as str and as UTF-8.

        Raises:
            DataError: a line is not a JSON object or lacks the field, or a text is not a valid string; names file and
                line.
        """
        for number, text in self._values(text_field):
            place = f"{self.where}:{number}" if self.unit == "line" else f"{self.where}: {self.unit} {number}"
            if not isinstance(text, str):
                raise DataError(f"{place}: {text_field!r} is {_short(text)}; allowed is a string")
            try:
                yield text, text.encode()
            except UnicodeEncodeError as fault:
                raise DataError(
                    f"{place}: the text contains {text[fault.start]!r}, half of a surrogate pair and not a character: "
                    "correct or remove it"
                ) from None

    def _values(self, text_field: str) -> Iterator[tuple[int, Any]]:
        """Yield the number and the text field of each document, whatever its type."""
        if not isinstance(self.content, bytes):
            yield from enumerate(self.content, self.first)
            return
        for number, line in enumerate(self.content.split(b"\n"), self.first):
            if line.strip():
                yield number, _field(_parsed(line, f"{self.where}:{number}"), text_field, f"{self.where}:{number}")


def iterate_texts(inputs: Sequence[str], text_field: str = "text") -> Iterator[str]:
    """Yield the text of every document, in order, except those of only white space.

    Raises:
        DataError: see find_inputs and Chunk.texts.
    """
    for chunk in read_chunks(find_inputs(inputs), text_field):
        yield from (text for text, _ in chunk.texts(text_field) if text.strip())


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
    return _read_json(read_blocks(path), source.spec, text_field, target, source.disk_bytes)


def _read_hub(spec: str, text_field: str) -> Iterator[Chunk]:
    """Read JSON and parquet files directly, one by one, and other formats through the `datasets` library."""
    split = hub.open_split(spec)
    if split.format not in ("json", "parquet"):
        rows = enumerate(hub.stream_rows(spec, split, text_field), 1)
        values = (_field(row, text_field, f"{spec}: row {number}") for number, row in rows)
        yield from _cut_values(spec, values, LARGEST_CHUNK_BYTES, 0)
        return
    for name in split.files:
        try:
            with hub.open_file(name) as file:
                if split.format == "parquet":
                    yield from _cut_values(name, _parquet_values(file, name, text_field), LARGEST_CHUNK_BYTES, 0)
                else:
                    blocks = decompressed_blocks(file, hub.base_name(name))
                    yield from _read_json(blocks, name, text_field, LARGEST_CHUNK_BYTES, 0, split.field)
        except OSError as fault:
            raise DataError(f"{spec}: {name} cannot be read: {fault.strerror or fault}") from fault


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
    list_field: str | None = None,
) -> Iterator[Chunk]:
    """Read JSON lines, or one JSON array if a .json begins with [; an array is loaded into memory completely.

    Args:
        blocks: blocks of the decompressed file, with the position on disk.
        where: the file, for messages.
        text_field: field of the text.
        target: bytes of a chunk.
        disk_bytes: length of the file on disk.
        list_field: field with the array, if the file is one object.
    """
    head = list(_take_until_content(blocks))
    begin = b"".join(block for block, _ in head).removeprefix(BYTE_ORDER_MARK).lstrip()
    _refuse_utf16(begin[:100], where)
    may_be_array = not where.endswith(tuple(f".jsonl{packing}" for packing in ("", *COMPRESSED_SUFFIXES)))
    if list_field is not None or (may_be_array and begin.startswith(b"[")):
        records = _parsed(b"".join(block for block, _ in (*head, *blocks)), where)
        if list_field is not None:
            records = _field(records, list_field, where)
        if not isinstance(records, list):
            raise DataError(f"{where}: {list_field!r} is {_short(records)}; allowed is a list of objects")
        values = (_field(record, text_field, f"{where}: row {row}") for row, record in enumerate(records, 1))
        return _cut_values(where, values, target, disk_bytes)
    return _cut_lines(where, chain(head, blocks), target)


def _take_until_content(blocks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    for block in blocks:
        yield block
        if block[0].strip():
            return


def _cut_lines(where: str, blocks: Iterator[tuple[bytes, int]], target: int) -> Iterator[Chunk]:
    """Cut chunks after the last line end within `target` bytes, or, in a longer line, after its end."""
    buffer = bytearray()
    first, position, reported, searched = 1, 0, 0, 0
    for block, position in blocks:
        if not buffer and first == 1:
            block = block.removeprefix(BYTE_ORDER_MARK)
        buffer += block
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


def _parsed(content: bytes, place: str) -> Any:
    content = content.removeprefix(BYTE_ORDER_MARK)
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as fault:
        raise DataError(f"{place}: byte {content[fault.start]:#04x} is not UTF-8; convert the file") from None
    except (ValueError, RecursionError) as fault:
        raise DataError(
            f"{place}: is not JSON ({fault}); begins with {_short(content[:60])}; allowed is one object per line, or "
            "in a .json file one array of objects"
        ) from None


def _field(record: Any, text_field: str, place: str) -> Any:
    if not isinstance(record, dict):
        raise DataError(f"{place}: is {_short(record)}; allowed is an object with the field {text_field!r}")
    if text_field not in record:
        fields = ", ".join(record) or "none"
        raise DataError(f"{place}: no field {text_field!r}; its fields are {fields}: choose one with {CHOOSE_FIELD}")
    return record[text_field]


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
