"""Expand file names and globs from the config or the command line, and refuse a file that is named twice."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from titan_cpt.data.prepare.decompress import COMPRESSED_SUFFIXES
from titan_cpt.errors import DataError
from titan_cpt.object_storage.filesystem import find, matching_urls
from titan_cpt.object_storage.locations import is_url

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

FileIdentity = tuple[int, int, int, int] | str
"""Device, inode, size and modification time: the same for every name of a file, links included. A URL in storage."""


def expand_glob(pattern: str) -> list[str]:
    """Return the names that a glob matches, sorted; [] for a name without glob characters.

    If a glob matches nothing, its leading folders that exist under their literal names are taken literally: a folder
    may be called `[v2]`.
    """
    if not glob.has_magic(pattern):
        return []
    if is_url(pattern):
        return matching_urls(pattern)
    return sorted(glob.glob(pattern, recursive=True) or glob.glob(_with_literal_folders(pattern), recursive=True))


def glob_escape_hint(entry: str) -> str:
    """How to escape glob characters, as the end of a message; empty for an entry without glob characters."""
    if not glob.has_magic(entry):
        return ""
    return ". *, ? and [ are glob characters: write [*], [?] and [[] for the literal characters"


def file_identity(path: str | Path) -> FileIdentity | None:
    """Return an identity that all names of a file share; None if the file does not exist."""
    if isinstance(path, str) and is_url(path):
        return path
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def name_exists(name: str) -> bool:
    """Whether a local file or folder, or an object in storage, exists.

    Raises:
        RemoteError: object storage refuses or does not answer.
    """
    return find(name) is not None if is_url(name) else os.path.exists(name)


def is_file(name: str) -> bool:
    """Whether a local file or an object in storage exists; see `name_exists`."""
    return find(name) is not None if is_url(name) else os.path.isfile(name)


class UniqueFiles:
    """Refuses a file that is named a second time, also by another spelling, a link or a glob."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._names: dict[FileIdentity, str] = {}

    def add(self, entry: str, name: str | Path, path: str | Path) -> None:
        """Record that `entry` of a list names `name`, whose content is the file `path`.

        Raises:
            DataError: an earlier entry named the file.
        """
        identity = file_identity(path)
        if identity is None:
            return  # the function that opens a missing file reports it
        earlier_name = self._names.get(identity)
        if earlier_name is not None:
            also = "" if earlier_name == str(name) else f" (before as {earlier_name})"
            raise DataError(
                f"{entry}: names {name} a second time{also}: its {self._what} would be read twice; name it once"
            )
        self._names[identity] = str(name)


def first_text_file(entries: Iterable[str]) -> str | None:
    """Return the first entry that is a text file, judged by its suffix, and not a token file."""
    endings = tuple(suffix + packing for suffix in TEXT_SUFFIXES for packing in ("", *COMPRESSED_SUFFIXES))
    return next((each for each in entries if each.endswith(endings) and (is_url(each) or Path(each).is_file())), None)


def as_entries(spec: str | Sequence[str]) -> list[str]:
    """Return a list of entries; a single string becomes a list of one."""
    return [spec] if isinstance(spec, str) else list(spec)


def _with_literal_folders(pattern: str) -> str:
    parts = Path(pattern).parts
    known = 0
    while known < len(parts) - 1 and Path(*parts[: known + 1]).is_dir():
        known += 1
    return os.path.join(glob.escape(str(Path(*parts[:known]))), *parts[known:]) if known else pattern
