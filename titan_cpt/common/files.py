"""Writing files atomically (temporary name, fsync, rename), folders that appear only when complete, file identity."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from titan_cpt.common.file_lock import exclusive

_MARK = "titan_cpt.lock"  # in a partial folder: shows that titan_cpt made it
_CONTENT = "content"  # in a partial folder: the folder that is written and renamed at the end
_UNFINISHED_SECONDS = 3600.0  # after which a temporary file that nobody writes to belongs to a killed process
_NAME_CHARACTERS = 40  # leading characters of a file's name in its temporary name; file systems allow 255 bytes


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file to write into, which replaces `path` at the end of the block; if the block fails, `path` is unchanged.

    After a crash or power failure `path` has either the complete old or the complete new content.

    Raises:
        OSError: the content cannot be written.
    """
    temporary, descriptor = _create_beside(path)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as fault:
        temporary.unlink(missing_ok=True)
        if isinstance(fault, OSError) and fault.errno and fault.filename is None:
            fault.filename = str(path)  # write() names no file in its error, such as on a full disk
        raise
    fsync(path.parent)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content; see `atomic_file`.

    Raises:
        OSError: the content cannot be written; the file is unchanged.
    """
    with atomic_file(path) as file:
        file.write(content)


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of `atomic_file(path)`: files that were not written to for an hour."""
    for temporary in path.parent.glob(f".{glob.escape(path.name[:_NAME_CHARACTERS])}.*.tmp"):
        with suppress(FileNotFoundError):  # another process removes it too
            if time.time() - temporary.stat().st_mtime > _UNFINISHED_SECONDS:
                temporary.unlink()


def require_writable(path: Path) -> None:
    """Create the folder of a file, and test that the file can be written there later, after hours of work.

    Raises:
        OSError: the folder cannot be created, or is not writable.
    """
    make_folder(path.parent)
    with suppress(FileNotFoundError):
        os.lstat(path)  # raises OSError if the name is impossible, such as one that is too long
    temporary, descriptor = _create_beside(path)
    os.close(descriptor)
    temporary.unlink()


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, unless it exists.

    Raises:
        OSError: it cannot be created; NotADirectoryError if it or a parent is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as fault:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), fault.filename) from None


def _create_beside(path: Path) -> tuple[Path, int]:
    """Path and descriptor of a new file in the same folder, because a rename does not cross file systems."""
    number = 0
    while True:
        temporary = path.with_name(f".{path.name[:_NAME_CHARACTERS]}.{os.getpid()}-{number}.tmp")
        try:
            return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            number += 1
        except OSError as error:  # name the file of the caller, not the hidden one
            raise OSError(error.errno, error.strerror, str(path)) from None


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode, equal for all names of one file (links, `..`, upper and lower case); None if it is missing."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def same_file(path: Path, others: Iterable[Path]) -> Path | None:
    """The first of `others` that is the same file on disk as `path`, possibly under another name; None if none is."""
    target = identity(path)
    return None if target is None else next((other for other in others if identity(other) == target), None)


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A new folder to write into; it is renamed to `out` at the end of the block, and removed if the block fails.

    The new folder is in `.NAME.partial` beside `out`. Content that an interrupted attempt left there is removed first;
    our lock file identifies it.

    Raises:
        FileExistsError: `.NAME.partial` exists without our lock file.
        BlockingIOError: another process is writing `out`.
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
            with suppress(OSError):  # not empty: a user's file in it stays
                folder.rmdir()
    fsync(out.parent)


def _is_empty(folder: Path) -> bool:
    """Whether a folder has no files, except .nfs files, which NFS keeps for removed files that are still open."""
    return folder.is_dir() and all(path.name.startswith(".nfs") for path in folder.iterdir())


def _held(out: Path, by: str) -> OSError:
    return BlockingIOError(
        errno.EWOULDBLOCK, f"another process is writing it now{by}; wait for it, or end it", str(out)
    )


def write_text_atomically(path: Path, text: str) -> None:
    """`write_bytes_atomically` for text, as UTF-8."""
    write_bytes_atomically(path, text.encode())


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
