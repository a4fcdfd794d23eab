"""Lengths of the documents of token files, in order, read in blocks; formats indexed, ds and raw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from titan_cpt.data.formats.array_file import TokenFile
from titan_cpt.data.formats.datatrove import count_ds, index_path
from titan_cpt.data.formats.indexed import count_tokens
from titan_cpt.data.formats.indexed_layout import (
    DAMAGED,
    FULL_CHECK_SEQUENCES,
    REMOTE_CHECK_SEQUENCES,
    Header,
    OpenFile,
    pair_locations,
    read_header,
    size_and_mtime,
    spans,
)
from titan_cpt.data.formats.raw import RawTokens
from titan_cpt.data.formats.token_files import TokenFiles
from titan_cpt.errors import DataError
from titan_cpt.object_storage.locations import Location, RemotePath

BLOCK = 1 << 20
"""Documents, or entries of an index, that are read at a time."""
SCAN_TOKENS = 1 << 24  # ids that are searched for the end-of-document id at a time

Lengths = NDArray[np.int64]


def document_lengths(files: TokenFiles, paths: Sequence[Location], eod_id: int) -> Iterator[Lengths]:
    """Yield the lengths in tokens of all documents in order, in blocks, int64 [n]. A document ends with its file.

    Args:
        files: the files of a source.
        paths: the result of `resolve_paths(files)`.
        eod_id: the end-of-document id, at which raw files are divided.

    Raises:
        DataError: a file is damaged, or raw files have no end-of-document id.
    """
    if files.format == "raw":
        yield from _scanned(files, paths, eod_id)
        return
    for path in paths:
        tokens, blocks = (count_ds(path), _ds_lengths(path)) if files.format == "ds" else _pair_lengths(path)
        found = 0
        for block in blocks:
            if len(block) and int(block.min()) < 0:
                raise DataError(f"{path}: its index has a document of negative length: {DAMAGED}")
            found += int(block.sum())
            yield block
        if found != tokens:
            raise DataError(f"{path}: {tokens} tokens, but the documents of its index have {found}: {DAMAGED}")


def borders_digest(files: TokenFiles, paths: Sequence[Location], eod_id: int) -> str:
    """Return a digest of the document borders; of an index of more than 16 million documents evenly spaced blocks.

    It depends neither on the paths nor on the machine, except for raw files, whose times of modification are included:
    their borders are known only after they have been read.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256(files.format.encode())
    for path in paths:
        if files.format == "raw":
            assert files.dtype is not None, "the config requires the dtype of raw files"
            content = RawTokens(path, dtype=files.dtype).digest
            digest.update(f"{content} {size_and_mtime(path)[1]} {eod_id}".encode())
            continue
        index = index_path(path) if files.format == "ds" else pair_locations(path)[1]
        digest.update(size_and_mtime(index)[0].to_bytes(8, "little"))
        with OpenFile(index) as file:
            for ranges in _index_ranges(index, ds=files.format == "ds"):
                for part in file.read_ranges(ranges):
                    digest.update(part)
    return digest.hexdigest()


def _index_ranges(index: Location, *, ds: bool) -> Iterator[list[tuple[int, int]]]:
    """Byte ranges of an index that describe the document borders: the sizes and document indices of an .idx."""
    limit = REMOTE_CHECK_SEQUENCES if isinstance(index, RemotePath) else FULL_CHECK_SEQUENCES
    if ds:
        yield [(8 * start, 8 * stop) for start, stop in spans(size_and_mtime(index)[0] // 8, block=65_536, limit=limit)]
        return
    header = read_header(index)
    for start, stop in spans(header.sequences, block=65_536, limit=limit):
        yield [(header.sizes_at(start), header.sizes_at(stop))]
    for start, stop in spans(header.document_indices, block=65_536, limit=limit):
        yield [(header.document_at(start), header.document_at(stop))]


def _pair_lengths(prefix: Location) -> tuple[int, Iterator[Lengths]]:
    """The tokens of a pair and the lengths of its documents."""
    return count_tokens(prefix), _idx_lengths(pair_locations(prefix)[1])


def _idx_lengths(idx: Location) -> Iterator[Lengths]:
    """Sum the sequences of each document. A sequence behind the last document index is a document of its own."""
    header = read_header(idx)
    last = 0
    with OpenFile(idx) as file:
        for start in range(0, header.document_indices - 1, BLOCK):
            upto = min(start + BLOCK + 1, header.document_indices)
            (data,) = file.read_ranges([(header.document_at(start), header.document_at(upto))])
            first_sequences = np.frombuffer(data, "<i8")
            if (np.diff(first_sequences) < 0).any() or not 0 <= first_sequences[0] <= first_sequences[-1] <= (
                header.sequences
            ):
                raise DataError(f"{idx}: document indices {start} to {upto - 1} do not increase: {DAMAGED}")
            last = int(first_sequences[-1])
            yield from _summed(file, header, first_sequences)
        for start in range(last, header.sequences, BLOCK):
            yield _sizes(file, header, start, min(start + BLOCK, header.sequences))


def _summed(file: OpenFile, header: Header, first_sequences: Lengths) -> Iterator[Lengths]:
    """The lengths of the documents between these document indices, int64 [len(first_sequences) - 1], in order."""
    begin, end = int(first_sequences[0]), int(first_sequences[-1])
    if end - begin <= 2 * BLOCK:
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(_sizes(file, header, begin, end))])
        yield np.diff(before[first_sequences - begin])
    elif len(first_sequences) > 2:  # documents of many sequences: fewer of them at a time
        middle = len(first_sequences) // 2
        yield from _summed(file, header, first_sequences[: middle + 1])
        yield from _summed(file, header, first_sequences[middle:])
    else:
        blocks = range(begin, end, BLOCK)
        yield np.array([sum(int(_sizes(file, header, start, min(start + BLOCK, end)).sum()) for start in blocks)])


def _sizes(file: OpenFile, header: Header, start: int, stop: int) -> Lengths:
    (data,) = file.read_ranges([(header.sizes_at(start), header.sizes_at(stop))])
    if len(data) != 4 * (stop - start):
        raise DataError(f"an .idx ends within its sizes {start} to {stop}: {DAMAGED}")
    return np.frombuffer(data, "<i4").astype(np.int64)


def _ds_lengths(path: Location) -> Iterator[Lengths]:
    index = index_path(path)
    documents = size_and_mtime(index)[0] // 8
    previous = 0
    with OpenFile(index) as file:
        for start in range(0, documents, BLOCK):
            stop = min(start + BLOCK, documents)
            (data,) = file.read_ranges([(8 * start, 8 * stop)])
            ends = np.frombuffer(data, "<u8").astype(np.int64)
            yield np.diff(ends, prepend=previous)
            previous = int(ends[-1])


def _scanned(files: TokenFiles, paths: Sequence[Location], eod_id: int) -> Iterator[Lengths]:
    """The documents of raw files: each ends with the end-of-document id, the last one of a file with the file."""
    assert files.dtype is not None, "the config requires the dtype of raw files"
    found = False
    for path in paths:
        file = RawTokens(path, dtype=files.dtype)
        begin = 0
        for ends in _ends_of_documents(file, eod_id):
            found |= bool(len(ends))
            yield np.diff(ends, prepend=begin)
            begin = int(ends[-1]) if len(ends) else begin
        if begin < file.tokens:
            yield np.array([file.tokens - begin])
        file.close()
    if not found:
        raise DataError(
            f"{', '.join(map(str, paths))}: the end-of-document id {eod_id} does not occur, so the documents are "
            'unknown: set packing = "concat", or prepare the data with this tokenizer'
        )


def _ends_of_documents(file: TokenFile, eod_id: int) -> Iterator[Lengths]:
    for start in range(0, file.tokens, SCAN_TOKENS):
        ids = file.read(start, min(SCAN_TOKENS, file.tokens - start))
        yield np.flatnonzero(ids == eod_id) + (start + 1)
