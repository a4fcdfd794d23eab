"""A run of numbers of one type inside a file, of which any stretch can be read: tokens, and the indices beside them.

Numbers are read with pread and not mapped, because a file that shrinks under a map kills the process (SIGBUS), while a
short read is an error with a name.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titan_cpt.data.formats.indexed_layout import DAMAGED, open_binary, read_exactly, read_head, size_and_mtime, spans
from titan_cpt.errors import DataError

NPY_MAGIC = b"\x93NUMPY"


class ArrayFile:
    """Numbers in a file, the file as it was when it was opened.

    Attributes:
        path: the file.
        dtype: the type of the numbers.
        count: how many there are.
        digest: SHA-256 over what describes the file, its length and evenly spread blocks of it.
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype[Any],
        *,
        offset_bytes: int = 0,
        count: int | None = None,
        described_by: Path | None = None,
        described_as: bytes = b"",
    ) -> None:
        """Look at the file.

        Args:
            path: the file.
            dtype: the type of the numbers.
            offset_bytes: where the first number lies.
            count: of the numbers; left out, all that there are behind the offset.
            described_by: a file whose first 64 KiB belong to the digest.
            described_as: what else belongs to it.

        Raises:
            DataError: the file cannot be read.
        """
        self.path, self.dtype = path, dtype
        self._fd: int | None = None
        self._offset_bytes, self._described_by, self._described_as = offset_bytes, described_by, described_as
        self._bytes, self._mtime_ns = size_and_mtime(path)
        self.count = (self._bytes - offset_bytes) // dtype.itemsize if count is None else count
        self.digest = self._content_digest()

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return numbers [start, start + count) as int64.

        Raises:
            DataError: the file changed since it was opened.
        """
        return self._stored(start, count).astype(np.int64)

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process gets the path and what was seen on open, never the file descriptor."""
        return {**self.__dict__, "_fd": None}

    def __del__(self) -> None:
        """Close the file with its last reader."""
        if getattr(self, "_fd", None) is not None:
            self.close()

    def _stored(self, start: int, count: int) -> npt.NDArray[Any]:
        """Numbers [start, start + count) in the file's own type."""
        if start < 0 or count < 0 or start + count > self.count:
            raise IndexError(f"{self.path}: numbers [{start}, {start + count}) of {self.count}")
        fd = self._opened()
        data = read_exactly(fd, count * self.dtype.itemsize, self._offset_bytes + start * self.dtype.itemsize)
        if len(data) != count * self.dtype.itemsize:
            raise DataError(f"{self.path}: ended at a read of numbers [{start}, {start + count}): {DAMAGED}")
        return np.frombuffer(data, self.dtype)

    def _opened(self) -> int:
        """The open file, compared with what it was when its checks were made."""
        if self._fd is None:
            try:
                self._fd = os.open(self.path, os.O_RDONLY)
            except OSError as fault:
                raise DataError(f"{self.path}: cannot be opened again: {fault.strerror}") from fault
        status = os.fstat(self._fd)
        if status.st_size != self._bytes:
            raise DataError(
                f"{self.path}: {status.st_size} bytes, and {self._bytes} when it was opened: something replaced it or "
                "cut it short under the running program. Restore it and start again; checkpoints are intact"
            )
        if status.st_mtime_ns != self._mtime_ns:
            self._mtime_ns = status.st_mtime_ns  # a touch or a copy of the same bytes is no harm
            if self._content_digest() != self.digest:
                raise DataError(
                    f"{self.path}: was rewritten with other tokens under the running program. Restore it and start "
                    "again; checkpoints are intact"
                )
        return self._fd

    def _content_digest(self) -> str:
        """SHA-256 over what describes the file and 16 evenly spread blocks of it, with its length."""
        head = read_head(self._described_by) if self._described_by else b""
        digest = hashlib.sha256(self._described_as + head + self._bytes.to_bytes(8, "little"))
        with open_binary(self.path) as file:
            for start, stop in spans(self._bytes, block=16_384, limit=16 * 16_384):
                digest.update(read_exactly(file.fileno(), stop - start, start))
        return digest.hexdigest()


class TokenFile(ArrayFile):
    """Token ids in a file, each compared with the vocabulary when it is read, and many of them before.

    Attributes:
        tokens: count.
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype[Any],
        *,
        vocab_size: int | None,
        scan_tokens: int,
        offset_bytes: int = 0,
        described_by: Path | None = None,
        described_as: bytes = b"",
    ) -> None:
        """Look at the file and at its ids.

        Args:
            path: the file.
            dtype: the type of the ids.
            vocab_size: ids must lie in [0, vocab_size); None leaves that unchecked.
            scan_tokens: a file of at most this many tokens has all its ids checked now, a larger one as many in evenly
                spread blocks; every window is checked when it is read in any case.
            offset_bytes: where the first id lies.
            described_by: see NumberFile.
            described_as: see NumberFile.

        Raises:
            DataError: the file cannot be read, or an id is not in the vocabulary.
        """
        super().__init__(path, dtype, offset_bytes=offset_bytes, described_by=described_by, described_as=described_as)
        self.tokens, self.vocab_size = self.count, vocab_size
        if vocab_size is not None:
            for start, stop in spans(self.tokens, block=65_536, limit=scan_tokens):
                self.read(start, stop - start)
        self.close()

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return tokens [start, start + count) as int64.

        Raises:
            DataError: the file changed since it was opened, or an id of the window is not in the vocabulary.
        """
        window = self._stored(start, count)
        if count and self.vocab_size is not None:
            self._check_vocabulary(window, start, self.vocab_size)
        return window.astype(np.int64)

    def _check_vocabulary(self, window: npt.NDArray[Any], start: int, vocab_size: int) -> None:
        """Raise DataError at the first id of a window that is not in [0, vocab_size)."""
        if int(window.max()) < vocab_size and int(window.min()) >= 0:
            return
        position = int(np.flatnonzero((window.astype(np.int64) >= vocab_size) | (window < 0))[0])
        raise DataError(
            f"{self.path}: token {start + position} has id {int(window[position])}; allowed are ids from 0 to "
            f"{vocab_size - 1}, the tokenizer's vocabulary. Was this data prepared with another tokenizer"
            f"{self._other_reason()}?"
        )

    def _other_reason(self) -> str:
        """What else may be at fault where an id is not in the vocabulary."""
        return ""


def npy_header(path: Path) -> tuple[np.dtype[Any], tuple[int, ...], int] | None:
    """Type, shape and first byte of the numbers of a .npy with a header; None for a file that begins otherwise.

    Raises:
        DataError: the header is damaged, or describes something else than integers in C order.
    """
    with open_binary(path) as file:
        if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
            return None
        file.seek(0)
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran, dtype = read(file)
        except (ValueError, KeyError, SyntaxError, TypeError) as fault:
            raise DataError(f"{path}: its .npy header cannot be read ({fault}): {DAMAGED}") from fault
        start_bytes = file.tell()
    if dtype.kind not in "iu" or (fortran and len(shape) > 1):
        raise DataError(f"{path}: holds {dtype}{' in Fortran order' * fortran}; allowed are integers in C order")
    needed, found = start_bytes + dtype.itemsize * int(np.prod(shape, dtype=np.int64)), size_and_mtime(path)[0]
    if found != needed:
        raise DataError(f"{path}: {found} bytes; its header's {shape} of {dtype.name} take {needed}: {DAMAGED}")
    return dtype, shape, start_bytes
