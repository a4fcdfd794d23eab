"""datatrove's .ds files: token ids without a header, and NAME.ds.index beside them.

The index holds the end of each document in tokens, as little-endian u64. The last end and the length of the .ds give
the bytes per id, 2 or 4.

Source: datatrove's TokenizedFile.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from titan_cpt.data.formats.array_file import TokenFile
from titan_cpt.data.formats.indexed_layout import DAMAGED, OpenFile, file_exists, size_and_mtime, spans
from titan_cpt.errors import DataError
from titan_cpt.object_storage.locations import Location, RemotePath, with_ending

DS_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
DS_SUFFIX = ".ds"
FULL_CHECK_DOCUMENTS = 16_000_000  # an index of more documents is checked in evenly spaced blocks
REMOTE_CHECK_DOCUMENTS = 1_000_000  # the same for an index in object storage


class DsTokens(TokenFile):
    """A datatrove .ds file and its .ds.index."""

    def __init__(self, path: Location, *, vocab_size: int | None = None, scan_tokens: int = 0) -> None:
        """Open and check the pair; see TokenFile.

        Raises:
            DataError: a file is missing or damaged, the two do not match, or an id is outside the vocabulary.
        """
        stored = _ds_dtype(path)
        _check_ends(path)
        super().__init__(path, stored, vocab_size=vocab_size, scan_tokens=scan_tokens, described_by=index_path(path))


def count_ds(path: Location) -> int:
    """Count the tokens of a .ds from its length and the last entry of its index.

    Raises:
        DataError: a file is missing or damaged.
    """
    return size_and_mtime(path)[0] // _ds_dtype(path).itemsize


def index_path(path: Location) -> Location:
    """Return the path of the index of a .ds."""
    return with_ending(path, ".index")


def _ds_dtype(path: Location) -> np.dtype[Any]:
    """Return the dtype of a .ds, from its length and the last entry of its index."""
    index = index_path(path)
    if not file_exists(index):
        raise DataError(
            f"{index}: is missing; datatrove writes it beside {path.name} (save_index). Copy both, or read the file "
            'with format = "raw" and its dtype'
        )
    size_bytes = size_and_mtime(path)[0]
    index_bytes = size_and_mtime(index)[0]
    if index_bytes % 8:
        raise DataError(f"{index}: {index_bytes} bytes are not a multiple of 8, the size of an entry: {DAMAGED}")
    with OpenFile(index) as file:
        last = file.read_ranges([(index_bytes - 8, index_bytes)])[0] if index_bytes else bytes(8)
    tokens = int.from_bytes(last, "little")
    if not tokens and not size_bytes:
        return DS_DTYPES[2]
    width, remainder = divmod(size_bytes, tokens) if tokens else (0, 0)
    if remainder or width not in DS_DTYPES:
        raise DataError(
            f"{path}: {size_bytes} bytes; the {tokens} tokens of its index take {2 * tokens} bytes as uint16 and "
            f"{4 * tokens} as uint32: {DAMAGED}"
        )
    return DS_DTYPES[width]


def _check_ends(path: Location) -> None:
    """Raise DataError if a document ends before the previous one."""
    index = index_path(path)
    documents = size_and_mtime(index)[0] // 8
    limit = REMOTE_CHECK_DOCUMENTS if isinstance(index, RemotePath) else FULL_CHECK_DOCUMENTS
    with OpenFile(index) as file:
        for start, stop in spans(documents, block=65_536, limit=limit):
            upto = min(stop + 1, documents)  # one more, to compare adjacent blocks as well
            ends = np.frombuffer(file.read(8 * (upto - start), 8 * start), "<u8")
            wrong = np.flatnonzero(ends[1:] < ends[:-1])
            if len(wrong):
                first = int(wrong[0])
                raise DataError(
                    f"{index}: document {start + first} ends at token {ends[first]}, and the next one at "
                    f"{ends[first + 1]}: {DAMAGED}"
                )
