"""Reading files that an earlier run left: absent, damaged and unreadable are three different things.

What is absent may be made anew and what is damaged may be replaced. What the system does not let us read (permission,
an input/output error, a stale network mount) may be whole: nothing is made or written in its place.
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
_NO_FILE = (errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)  # something else under that name: damage, not permission


def read_text(path: Path) -> str:
    """A file's text, UTF-8.

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it is no text, or no file: damaged.
        AccessError: it is there and the system does not let it be read.
    """
    with readable(path):
        return path.read_text(encoding="utf-8")


def is_there(path: Path) -> bool:
    """Whether a file or folder exists.

    Raises:
        AccessError: the system does not let us see.
    """
    try:
        with readable(path):
            path.stat()
    except (FileNotFoundError, ValueError):
        return False
    return True


def matching(folder: Path, *patterns: str) -> list[Path]:
    """The paths folder/a/b/... whose parts match the patterns one by one, sorted; [] if the folder is absent.

    Unlike `Path.glob`, which leaves out what it is not allowed to see.

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
        return []  # absent, or a file


def is_absent(error: BaseException | None) -> bool:
    """Whether an error says that a file does not exist, or that something which is no file has its name."""
    return isinstance(error, OSError) and error.errno in (*_ABSENT, *_NO_FILE)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Sort the system's errors within the block: FileNotFoundError, ValueError or AccessError, as `read_text`."""
    try:
        yield
    except OSError as error:
        if error.errno in _ABSENT:
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
        if error.errno in _NO_FILE:
            raise ValueError(f"{path}: {error.strerror}") from None
        raise AccessError(
            f"{path}: cannot be read: {error.strerror}. That is not damage, so nothing is made in its place: change "
            "its permissions or repair the file system, then run the command again; or move it out of this folder"
        ) from None
