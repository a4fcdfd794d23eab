"""Files written whole, and never over or beside what is not ours: temporary names, partial folders, file identity."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from titan_cpt.locks import exclusive

MARK = ".titan_cpt-partial"  # the lock file by which a partial folder is recognized as ours
_NAME_CHARACTERS = 40  # of the file's own name in its temporary name: 255 bytes are the limit of most file systems


def write_whole(path: Path, content: bytes) -> None:
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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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


def sync_folder(folder: Path) -> None:
    """Make renames in a folder outlive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """A new folder beside `out` to write into; renamed to `out` at the end of the block, removed if the block fails.

    The folder is `.NAME.partial`. One that an interrupted attempt left, which holds our lock file, is replaced.

    Raises:
        FileExistsError: a folder of that name exists that is not known to be ours.
        BlockingIOError: another process is writing it now.
    """
    out = Path(os.path.realpath(out))
    folder = out.with_name(f".{out.name}.partial")
    if os.path.lexists(folder) and not (folder / MARK).is_file():
        raise FileExistsError(
            errno.EEXIST,
            "exists, and titan_cpt did not write it (or an older version did): rename or remove it",
            str(folder),
        )
    make_folder(folder)
    with exclusive(folder / MARK, held=lambda by: _held(out, by)):
        for left in folder.iterdir():
            if left.name != MARK:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield folder
            (folder / MARK).unlink()
            folder.rename(out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _held(out: Path, by: str) -> OSError:
    return BlockingIOError(
        errno.EWOULDBLOCK, f"another process is writing it now{by}; wait for it, or end it", str(out)
    )
