"""ArrayFile: a 1-D integer array in a file, read by range like a memmap. TokenFile: such an array of token ids.

Ranges are read with pread, not through np.memmap: if a mapped file is truncated, the process dies of SIGBUS; a short
read is an error that names the file.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_cpt.data.formats.indexed_layout import DAMAGED, OpenFile, read_exactly, read_head, size_and_mtime, spans
from titan_cpt.errors import DataError
from titan_cpt.object_storage.locations import Location, RemotePath
from titan_cpt.object_storage.remote_file import RemoteFile

REMOTE_SCAN_TOKENS = 1_000_000  # ids of a file in object storage that are checked on open
NPY_MAGIC = b"\x93NUMPY"


class ArrayFile:
    """A 1-D integer array in a file. A read fails if the file changed since it was opened.

    Attributes:
        path: the file.
        dtype: dtype of the array.
        count: number of elements.
        digest: SHA-256 over `described_as`, the head of `described_by`, the file's length and evenly spaced blocks.
    """

    def __init__(
        self,
        path: Location,
        dtype: np.dtype[Any],
        *,
        offset_bytes: int = 0,
        count: int | None = None,
        described_by: Location | None = None,
        described_as: bytes = b"",
    ) -> None:
        """Read the length and the digest of the file.

        Args:
            path: the file.
            dtype: dtype of the array.
            offset_bytes: offset of the first element.
            count: number of elements; None for all that follow the offset.
            described_by: a file whose first 64 KiB enter the digest.
            described_as: bytes that enter the digest.

        Raises:
            DataError: the file cannot be read.
        """
        self.path = path
        self.dtype = dtype
        self._fd: int | None = None
        self._offset_bytes = offset_bytes
        self._described_by = described_by
        self._described_as = described_as
        self._remote = RemoteFile(path) if isinstance(path, RemotePath) else None
        self._bytes, self._mtime_ns = size_and_mtime(path) if self._remote is None else (self._remote.size, 0)
        self.count = (self._bytes - offset_bytes) // dtype.itemsize if count is None else count
        self.digest = self._content_digest()

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return elements [start, start + count) as int64.

        Raises:
            DataError: the file changed since it was opened.
        """
        return self._stored(start, count).astype(np.int64)

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch elements [start, stop) of a remote file that will be read soon into the cache, all at once."""
        if self._remote is not None:
            width = self.dtype.itemsize
            self._remote.fetch(
                [(self._offset_bytes + start * width, self._offset_bytes + stop * width) for start, stop in ranges]
            )

    def close(self) -> None:
        """Close the file; the next read reopens it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything except the file descriptor."""
        return {**self.__dict__, "_fd": None}

    def __del__(self) -> None:
        """Close the file. When the interpreter ends, names of modules may be None, and the system closes it."""
        if getattr(self, "_fd", None) is not None and os is not None:
            self.close()

    def _stored(self, start: int, count: int) -> npt.NDArray[Any]:
        """Return elements [start, start + count) in the dtype of the file."""
        if start < 0 or count < 0 or start + count > self.count:
            raise IndexError(f"{self.path}: elements [{start}, {start + count}) of {self.count}")
        first, size = self._offset_bytes + start * self.dtype.itemsize, count * self.dtype.itemsize
        data = read_exactly(self._opened(), size, first) if self._remote is None else self._remote.read(first, size)
        if len(data) != count * self.dtype.itemsize:
            raise DataError(f"{self.path}: ends within elements [{start}, {start + count}): {DAMAGED}")
        return np.frombuffer(data, self.dtype)

    def _opened(self) -> int:
        """Return the file descriptor, after comparing the file with what was checked on open."""
        if self._fd is None:
            try:
                self._fd = os.open(str(self.path), os.O_RDONLY)
            except OSError as fault:
                raise DataError(f"{self.path}: cannot be reopened: {fault.strerror}") from fault
        status = os.fstat(self._fd)
        if status.st_size != self._bytes:
            raise DataError(
                f"{self.path}: {status.st_size} bytes, but {self._bytes} when this run opened it: it was replaced or "
                "truncated during the run. Restore it and start again; checkpoints are intact"
            )
        if status.st_mtime_ns != self._mtime_ns:
            self._mtime_ns = status.st_mtime_ns  # the same bytes with a new time are fine
            if self._content_digest() != self.digest:
                raise DataError(
                    f"{self.path}: other tokens were written to it during the run. Restore it and start again; "
                    "checkpoints are intact"
                )
        return self._fd

    def _content_digest(self) -> str:
        """SHA-256 over the description of the file, its length and 16 evenly spaced blocks."""
        head = read_head(self._described_by) if self._described_by else b""
        digest = hashlib.sha256(self._described_as + head + self._bytes.to_bytes(8, "little"))
        with OpenFile(self.path, self._remote) as file:
            for block in file.read_ranges(list(spans(self._bytes, block=16_384, limit=16 * 16_384))):
                digest.update(block)
        return digest.hexdigest()


class TokenFile(ArrayFile):
    """Token ids in a file. Every id is compared with the vocabulary when it is read, and many on open.

    Attributes:
        tokens: number of tokens.
    """

    def __init__(
        self,
        path: Location,
        dtype: np.dtype[Any],
        *,
        vocab_size: int | None,
        scan_tokens: int,
        offset_bytes: int = 0,
        described_by: Location | None = None,
        described_as: bytes = b"",
    ) -> None:
        """Open the file and check its ids.

        Args:
            path: the file.
            dtype: dtype of the ids.
            vocab_size: ids must be in [0, vocab_size); None disables the check.
            scan_tokens: number of ids to check on open: all ids of a smaller file, evenly spaced blocks of a larger
                one; at most REMOTE_SCAN_TOKENS of a file in object storage. Every read checks its own ids as well.
            offset_bytes: offset of the first id.
            described_by: see ArrayFile.
            described_as: see ArrayFile.

        Raises:
            DataError: the file cannot be read, or an id is outside the vocabulary.
        """
        super().__init__(path, dtype, offset_bytes=offset_bytes, described_by=described_by, described_as=described_as)
        self.tokens = self.count
        self.vocab_size = vocab_size
        if vocab_size is not None:
            limit = scan_tokens if self._remote is None else min(scan_tokens, REMOTE_SCAN_TOKENS)
            blocks = list(spans(self.tokens, block=65_536, limit=limit))
            self.fetch(blocks)
            for start, stop in blocks:
                self.read(start, stop - start)
        self.close()

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return tokens [start, start + count) as int64.

        Raises:
            DataError: the file changed since it was opened, or one of these ids is outside the vocabulary.
        """
        window = self._stored(start, count)
        if count and self.vocab_size is not None:
            self._check_vocabulary(window, start, self.vocab_size)
        return window.astype(np.int64)

    def _check_vocabulary(self, window: npt.NDArray[Any], start: int, vocab_size: int) -> None:
        """Raise DataError for the first id of a window that is outside [0, vocab_size)."""
        if int(window.max()) < vocab_size and int(window.min()) >= 0:
            return
        position = int(np.flatnonzero((window.astype(np.int64) >= vocab_size) | (window < 0))[0])
        raise DataError(
            f"{self.path}: token {start + position} has id {int(window[position])}; allowed are ids from 0 to "
            f"{vocab_size - 1}, the tokenizer's vocabulary. Was this data prepared with another tokenizer"
            f"{self._other_reason()}?"
        )

    def _other_reason(self) -> str:
        """Another possible cause of an id outside the vocabulary, for the message."""
        return ""


def npy_header(path: Location) -> tuple[np.dtype[Any], tuple[int, ...], int] | None:
    """Return dtype, shape and data offset from the header of a .npy file; None if the file has no such header.

    Raises:
        DataError: the header is damaged, or the array does not contain integers in C order.
    """
    head = read_head(path)
    if not head.startswith(NPY_MAGIC):
        return None
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError, SyntaxError, TypeError) as fault:
        raise DataError(f"{path}: its .npy header cannot be read ({fault}): {DAMAGED}") from fault
    start_bytes = file.tell()
    if dtype.kind not in "iu" or (fortran and len(shape) > 1):
        raise DataError(f"{path}: contains {dtype}{' in Fortran order' * fortran}; allowed are integers in C order")
    expected_bytes = start_bytes + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    size_bytes = size_and_mtime(path)[0]
    if size_bytes != expected_bytes:
        raise DataError(
            f"{path}: {size_bytes} bytes; the {dtype.name} array of shape {shape} in its header takes "
            f"{expected_bytes}: {DAMAGED}"
        )
    return dtype, shape, start_bytes
