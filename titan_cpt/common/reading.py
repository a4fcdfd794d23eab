"""Reading files of an earlier run: a file may be missing, damaged or unreadable, and callers treat these differently.

A missing file can be written anew and a damaged one replaced. A file that the operating system does not let us read
(permission, I/O error, stale network mount) may be intact, so nothing is written in its place.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from titan_cpt.errors import AccessError

_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_NO_FILE = (errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)  # the name is not that of a file: damage, not permission


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not a file, or not UTF-8: damaged.
        AccessError: it exists, and the operating system refuses to read it.
    """
    with readable(path):
        return path.read_text(encoding="utf-8")


def is_there(path: Path) -> bool:
    """Whether a file or folder exists.

    Raises:
        AccessError: the operating system refuses access to a folder of the path.
    """
    try:
        with readable(path):
            path.stat()
    except (FileNotFoundError, ValueError):
        return False
    return True


def matching(folder: Path, *patterns: str) -> list[Path]:
    """The paths folder/a/b/... whose parts match the patterns one by one, sorted; [] if the folder is missing.

    Unlike `Path.glob` it does not silently omit folders that it may not read.

    Raises:
        AccessError: a folder on the way cannot be read.
    """
    found = [folder]
    for pattern in patterns:
        found = [path for parent in found for path in _children(parent, pattern)]
    return found


def _children(folder: Path, pattern: str) -> list[Path]:
    if not any(letter in pattern for letter in "*?["):
        return [folder / pattern] if is_there(folder / pattern) else []
    try:
        with readable(folder), os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if fnmatchcase(entry.name, pattern))
    except (FileNotFoundError, ValueError):
        return []  # missing, or a file


def is_absent(error: BaseException | None) -> bool:
    """Whether an error means that a file does not exist, or that its name is not that of a file."""
    return isinstance(error, OSError) and error.errno in (*_ABSENT, *_NO_FILE)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Translate OSErrors in the block into FileNotFoundError, ValueError or AccessError, as `read_text` raises them."""
    try:
        yield
    except OSError as error:
        if error.errno in _ABSENT:
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
        if error.errno in _NO_FILE:
            raise ValueError(f"{path}: {error.strerror}") from None
        raise AccessError(
            f"{path}: cannot be read: {error.strerror}. It may be intact, so it was not replaced: change its "
            "permissions or repair the file system, then run the command again; or move it out of this folder"
        ) from None
