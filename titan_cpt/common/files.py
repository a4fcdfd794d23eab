"""Files written whole, and never over or beside what is not ours: temporary names, partial folders, file identity."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from titan_cpt.common.file_lock import exclusive

_MARK, _CONTENT = "titan_cpt.lock", "content"  # of a partial folder: what proves that it is ours, and what is written
_NAME_CHARACTERS = 40  # of the file's own name in its temporary name: 255 bytes are the limit of most file systems


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content: after a power failure the file holds the old content or the new one, whole.

    Raises:
        OSError: the content cannot be written; the file is as it was.
    """
    temporary, descriptor = _create_beside(path)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as fault:
        temporary.unlink(missing_ok=True)
        if isinstance(fault, OSError) and fault.errno and fault.filename is None:  # of a write, such as on a full disk
            fault.filename = str(path)
        raise
    fsync(path.parent)


def require_writable(path: Path) -> None:
    """Make the folder of a file that is going to be written, and try to write there: before hours of work, not after.

    Raises:
        OSError: the folder cannot be made, or no file can be made in it.
    """
    make_folder(path.parent)
    with suppress(FileNotFoundError):
        os.lstat(path)  # raises where the name itself is impossible, such as one that is too long
    temporary, descriptor = _create_beside(path)
    os.close(descriptor)
    temporary.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; one that is there is left as it is.

    Raises:
        OSError: it cannot be made; NotADirectoryError if it, or one above it, is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as fault:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), fault.filename) from None


def _create_beside(path: Path) -> tuple[Path, int]:
    """A file that did not exist before, in the same folder, because a rename does not cross file systems."""
    number = 0
    while True:
        temporary = path.with_name(f".{path.name[:_NAME_CHARACTERS]}.{os.getpid()}-{number}.tmp")
        try:
            return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            number += 1


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode: equal for two names of one file, be it by links, by `..` or by case; None if there is none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def same_file(path: Path, others: Iterable[Path]) -> Path | None:
    """The first of `others` that is the same file on the disk as `path`, under whatever name."""
    wanted = identity(path)
    return None if wanted is None else next((other for other in others if identity(other) == wanted), None)


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A new folder to write into, which is renamed to `out` at the end of the block, and removed if the block fails.

    It is inside `.NAME.partial` beside `out`. What an interrupted attempt left there is recognized by its lock file and
    removed.

    Raises:
        FileExistsError: `.NAME.partial` exists and is not known to be ours.
        BlockingIOError: another process is writing it now.
    """
    out = Path(os.path.realpath(out))
    folder = out.with_name(f".{out.name}.partial")
    if os.path.lexists(folder) and not (folder / _MARK).is_file() and not _is_empty(folder):
        reason = "exists, and this version of titan_cpt did not write it"
        raise FileExistsError(errno.EEXIST, reason, str(folder))
    make_folder(folder)
    with exclusive(folder / _MARK, held=lambda by: _held(out, by)):
        shutil.rmtree(folder / _CONTENT, ignore_errors=True)
        (folder / _CONTENT).mkdir()
        try:
            yield folder / _CONTENT
            (folder / _CONTENT).rename(out)
        finally:
            shutil.rmtree(folder / _CONTENT, ignore_errors=True)
            (folder / _MARK).unlink(missing_ok=True)
            with suppress(OSError):  # not empty: someone put a file there, which stays
                folder.rmdir()
    fsync(out.parent)


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what NFS makes of files that were removed while they were open."""
    return folder.is_dir() and all(path.name.startswith(".nfs") for path in folder.iterdir())


def _held(out: Path, by: str) -> OSError:
    return BlockingIOError(
        errno.EWOULDBLOCK, f"another process is writing it now{by}; wait for it, or end it", str(out)
    )


def write_text_atomically(path: Path, text: str) -> None:
    """The whole text or what was there before, whenever the power fails."""
    write_bytes_atomically(path, text.encode())


def fsync(path: Path) -> None:
    """Write a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
