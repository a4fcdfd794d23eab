"""Headerless memmaps of token ids: OLMo's .npy and nanoGPT's train.bin.

Such a file holds nothing except ids, so the config must give their dtype. If a .npy was saved with a header, the header
is compared with that dtype.

Sources: OLMo-core's NumPy datasets and nanoGPT's data/*/prepare.py (ndarray.tofile of one array).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from titan_cpt.data.file_names import UniqueFiles, expand_glob, glob_escape_hint, is_file
from titan_cpt.data.formats.array_file import TokenFile, npy_header
from titan_cpt.data.formats.indexed_layout import DAMAGED, OpenFile, size_and_mtime
from titan_cpt.errors import DataError
from titan_cpt.object_storage.locations import CacheSettings, Location, located

LOOKED_AT_TOKENS = 65_536  # read from the beginning, to detect a dtype of another width


class RawTokens(TokenFile):
    """A headerless file of ids whose dtype the config gives."""

    def __init__(self, path: Location, *, dtype: str, vocab_size: int | None = None, scan_tokens: int = 0) -> None:
        """Open and check the file.

        Args:
            path: the file.
            dtype: "uint16", "uint32", "int32" or "int64", little-endian.
            vocab_size: see TokenFile.
            scan_tokens: see TokenFile.

        Raises:
            DataError: the file is missing, its length is not a multiple of the id size, its ids look like another
                dtype, or an id is outside the vocabulary.
        """
        stored, offset_bytes = _layout(path, dtype)
        self._dtype_name = dtype
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
        return f", or is it of another dtype than {self._dtype_name}"


def count_raw(path: Location, dtype: str) -> int:
    """Count the tokens of a headerless file from its length.

    Raises:
        DataError: the file is missing, or its length is not a multiple of the id size.
    """
    stored, offset_bytes = _layout(path, dtype)
    return (size_and_mtime(path)[0] - offset_bytes) // stored.itemsize


def find_files(spec: Sequence[str], *, suffix: str = "", cache: CacheSettings | None = None) -> list[Location]:
    """Return the files named by paths or globs, in order; globs are sorted and match only files with `suffix`.

    Raises:
        DataError: an entry matches no file, or a file is named twice.
    """
    found: list[Location] = []
    once = UniqueFiles("tokens")
    for entry in spec:
        matched = _match(entry, suffix)
        if not matched:
            kind = f"*{suffix} file" if suffix else "file"
            allowed = "Allowed are a full file name, a glob, or a list of these"
            raise DataError(f"{entry}: no {kind} of that name. {allowed}{glob_escape_hint(entry)}")
        for name in matched:
            once.add(entry, name, name)
            found.append(located(name, cache))
    return found


def missing_files(spec: Sequence[str], *, suffix: str = "") -> list[str]:
    """Return the entries (see find_files) that match no file yet."""
    return [entry for entry in spec if not _match(entry, suffix)]


def _match(entry: str, suffix: str) -> list[str]:
    """Return the files that an entry matches; an existing literal name is not globbed."""
    if is_file(entry):
        return [entry] if entry.endswith(suffix) else []
    return [name for name in expand_glob(entry) if name.endswith(suffix) and is_file(name)]


def _layout(path: Location, dtype: str) -> tuple[np.dtype[Any], int]:
    """Return the dtype and the offset of the ids."""
    configured = np.dtype(dtype).newbyteorder("<")
    header = npy_header(path)
    if header is not None:
        stored, shape, offset_bytes = header
        if stored != configured or len(shape) != 1:
            raise DataError(
                f"{path}: its .npy header says {stored.name} of shape {shape}; allowed is dtype = {dtype}, as in "
                "the config, and one dimension. Set dtype to that of the header, or save the array flattened"
            )
        return stored, offset_bytes
    size_bytes, _ = size_and_mtime(path)
    if size_bytes % configured.itemsize:
        raise DataError(
            f"{path}: {size_bytes} bytes are not a multiple of {configured.itemsize}, the size of a {dtype} id: the "
            f"dtype is wrong, or {DAMAGED}"
        )
    return configured, 0


def _refuse_other_width(path: Location, stored: np.dtype[Any], offset_bytes: int, vocab_size: int) -> None:
    """Raise DataError if each id is evidently one half of a wider id.

    The upper half of an id is at most (vocab_size - 1) >> 16. If no value at an odd position exceeds that and some
    value at an even position does, the odd positions are upper halves. The opposite error, ids of half the width, needs
    no check here: two ids read as one exceed the vocabulary.
    """
    with OpenFile(path) as file:
        ids = np.frombuffer(file.read(LOOKED_AT_TOKENS * stored.itemsize, offset_bytes), stored)
    highest = 0 if stored.itemsize > 2 else (vocab_size - 1) >> 16
    if len(ids) >= 64 and int(ids[1::2].max()) <= highest < int(ids[::2].max()):
        wider = {2: "uint32 or int32", 4: "int64"}.get(stored.itemsize, "a wider type")
        raise DataError(
            f"{path}: every second id is {highest} or less, as if each were half of a wider id. Is the dtype {wider}, "
            f"not {stored.name} as in the config? Set dtype to the one that the file was written with"
        )
