"""Tokens without Megatron's index: headerless memmaps (OLMo's .npy, nanoGPT's train.bin) and datatrove's .ds.

A headerless file is nothing but ids, so that its number type must be told; a .npy that was saved with a header is
compared with it. Beside datatrove's NAME.ds stands NAME.ds.index: where each document ends, in tokens, as u64
little-endian; the last end and the length of the .ds give the width of an id, 2 or 4 bytes.

Sources: OLMo-core's NumPy datasets and nanoGPT's data/*/prepare.py (ndarray.tofile of one array); datatrove's
TokenizedFile.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titan_cpt.data.file_names import Once, escape_hint, matches
from titan_cpt.data.formats.indexed_layout import DAMAGED, open_binary, read_exactly, size_and_mtime, spans
from titan_cpt.data.formats.number_file import TokenFile, npy_header
from titan_cpt.errors import DataError

DS_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
DS_SUFFIX = ".ds"
FULL_CHECK_DOCUMENTS = 16_000_000  # an index of more documents is checked in evenly spread blocks
LOOKED_AT_TOKENS = 65_536  # of the beginning, to tell a type of another width


class RawTokens(TokenFile):
    """A file of ids in a number type that its user names."""

    def __init__(self, path: Path, *, dtype: str, vocab_size: int | None = None, scan_tokens: int = 0) -> None:
        """Open and check the file.

        Args:
            path: the file.
            dtype: "uint16", "uint32", "int32" or "int64", little-endian.
            vocab_size: see TokenFile.
            scan_tokens: see TokenFile.

        Raises:
            DataError: the file is missing, no whole number of ids long, evidently of another type, or an id is not in
                the vocabulary.
        """
        stored, offset_bytes = _layout(path, dtype)
        self._asked = dtype
        if vocab_size is not None:
            _refuse_other_width(path, stored, offset_bytes, vocab_size)
        super().__init__(
            path,
            stored,
            vocab_size=vocab_size,
            scan_tokens=scan_tokens,
            offset_bytes=offset_bytes,
            described_as=dtype.encode(),
        )

    def _other_reason(self) -> str:
        return f", or is it of another dtype than {self._asked}"


class DsTokens(TokenFile):
    """A datatrove .ds with its .ds.index."""

    def __init__(self, path: Path, *, vocab_size: int | None = None, scan_tokens: int = 0) -> None:
        """Open and check the pair; see TokenFile.

        Raises:
            DataError: a file is missing or damaged, the two do not belong together, or an id is not in the vocabulary.
        """
        stored = _ds_dtype(path)
        _check_ends(path)
        super().__init__(path, stored, vocab_size=vocab_size, scan_tokens=scan_tokens, described_by=index_path(path))


def count_raw(path: Path, dtype: str) -> int:
    """Tokens of a headerless file from its length.

    Raises:
        DataError: it is missing, or no whole number of ids long.
    """
    stored, offset_bytes = _layout(path, dtype)
    return (size_and_mtime(path)[0] - offset_bytes) // stored.itemsize


def count_ds(path: Path) -> int:
    """Tokens of a .ds from its length and the last entry of its index.

    Raises:
        DataError: a file is missing or damaged.
    """
    return size_and_mtime(path)[0] // _ds_dtype(path).itemsize


def index_path(path: Path) -> Path:
    """The index beside a .ds."""
    return Path(f"{path}.index")


def find_files(spec: Sequence[str], *, suffix: str = "") -> list[Path]:
    """Return the files that paths or globs name, in order; globs are sorted and take only files of that suffix.

    Raises:
        DataError: an entry names no file, or a file is named twice.
    """
    found: list[Path] = []
    once = Once("tokens")
    for entry in spec:
        matched = _match(entry, suffix)
        if not matched:
            kind = f"*{suffix} file" if suffix else "file"
            allowed = "Allowed are a path with its ending, a glob, or a list"
            raise DataError(f"{entry}: no {kind} of that name. {allowed}{escape_hint(entry)}")
        for name in matched:
            once.add(entry, name, name)
            found.append(Path(name))
    return found


def missing_files(spec: Sequence[str], *, suffix: str = "") -> list[str]:
    """Return those entries (see find_files) for which no file is there yet; [] if all are."""
    return [entry for entry in spec if not _match(entry, suffix)]


def _match(entry: str, suffix: str) -> list[str]:
    """The files that an entry names; a literal name goes before a glob."""
    if os.path.isfile(entry):
        return [entry] if entry.endswith(suffix) else []
    return [name for name in matches(entry) if name.endswith(suffix) and os.path.isfile(name)]


def _layout(path: Path, dtype: str) -> tuple[np.dtype[Any], int]:
    """Number type and first byte of the ids."""
    asked = np.dtype(dtype).newbyteorder("<")
    header = npy_header(path)
    if header is not None:
        stored, shape, offset_bytes = header
        if stored != asked or len(shape) != 1:
            raise DataError(
                f"{path}: its .npy header says {stored.name} of shape {shape}; allowed is one dimension of the dtype "
                f"that the config gives, {dtype}. Set dtype to the header's, or save the array flat"
            )
        return stored, offset_bytes
    size_bytes, _ = size_and_mtime(path)
    if size_bytes % asked.itemsize:
        raise DataError(
            f"{path}: {size_bytes} bytes, no whole number of {dtype} ids of {asked.itemsize} bytes: the dtype is "
            f"another, or {DAMAGED}"
        )
    return asked, 0


def _refuse_other_width(path: Path, stored: np.dtype[Any], offset_bytes: int, vocab_size: int) -> None:
    """Raise DataError where every id is evidently one half of a wider one.

    The upper half of an id is at most (vocab_size - 1) >> 16; if nothing larger stands at any odd place, and something
    larger at the even ones, then those are upper halves. Ids of half the width need no such look: joined in pairs they
    lie beyond the vocabulary.
    """
    with open_binary(path) as file:
        ids = np.frombuffer(read_exactly(file.fileno(), LOOKED_AT_TOKENS * stored.itemsize, offset_bytes), stored)
    highest = 0 if stored.itemsize > 2 else (vocab_size - 1) >> 16
    if len(ids) >= 64 and int(ids[1::2].max()) <= highest < int(ids[::2].max()):
        wider = {2: "uint32 or int32", 4: "int64"}.get(stored.itemsize, "a wider type")
        raise DataError(
            f"{path}: every second id is {highest} or less, as if each were half of a wider one: the config's dtype is "
            f"{stored.name}, is it {wider}? Give the dtype that the file was written with"
        )


def _ds_dtype(path: Path) -> np.dtype[Any]:
    """Number type of a .ds, from its length and the last entry of its index."""
    index = index_path(path)
    if not index.exists():
        raise DataError(
            f"{index}: is missing; datatrove writes it beside {path.name} (save_index). Copy both; without it, read "
            'the file with format = "raw" and its dtype'
        )
    size_bytes, (index_bytes, _) = size_and_mtime(path)[0], size_and_mtime(index)
    if index_bytes % 8:
        raise DataError(f"{index}: {index_bytes} bytes, no whole number of document ends of 8 bytes: {DAMAGED}")
    with open_binary(index) as file:
        last = read_exactly(file.fileno(), 8, index_bytes - 8) if index_bytes else bytes(8)
    tokens = int.from_bytes(last, "little")
    if not tokens and not size_bytes:
        return DS_DTYPES[2]
    width, left = divmod(size_bytes, tokens) if tokens else (0, 0)
    if left or width not in DS_DTYPES:
        raise DataError(
            f"{path}: {size_bytes} bytes; its index ends after {tokens} tokens, which take {2 * tokens} bytes as "
            f"uint16 and {4 * tokens} as uint32: {DAMAGED}"
        )
    return DS_DTYPES[width]


def _check_ends(path: Path) -> None:
    """Raise DataError unless the ends of documents never fall."""
    index = index_path(path)
    documents = size_and_mtime(index)[0] // 8
    with open_binary(index) as file:
        for start, stop in spans(documents, block=65_536, limit=FULL_CHECK_DOCUMENTS):
            upto = min(stop + 1, documents)  # one more, so that blocks are compared with each other too
            ends = np.frombuffer(read_exactly(file.fileno(), 8 * (upto - start), 8 * start), "<u8")
            wrong = np.flatnonzero(ends[1:] < ends[:-1])
            if len(wrong):
                first = int(wrong[0])
                raise DataError(
                    f"{index}: document {start + first} ends after token {ends[first]}, and the next one after "
                    f"{ends[first + 1]}: {DAMAGED}"
                )
