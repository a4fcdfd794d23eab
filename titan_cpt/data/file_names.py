"""From names and globs in a config or on the command line to files, each of which is read once."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from titan_cpt.data.prepare.decompress import COMPRESSED_SUFFIXES
from titan_cpt.errors import DataError

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

FileIdentity = tuple[int, int, int, int]
"""Device, inode, size and time of change: equal for one file under all its names, links included."""


def expand_glob(pattern: str) -> list[str]:
    """The names that a glob matches, sorted; [] for a name without glob characters.

    Where a glob matches nothing, the folders at its beginning that exist as they are written are taken literally: a
    folder may be called `[v2]`.
    """
    if not glob.has_magic(pattern):
        return []
    return sorted(glob.glob(pattern, recursive=True) or glob.glob(_with_literal_folders(pattern), recursive=True))


def glob_escape_hint(entry: str) -> str:
    """How to write a character that means something in a glob; empty for an entry without such characters."""
    if not glob.has_magic(entry):
        return ""
    return ". In a glob *, ? and [ have a meaning: write [*], [?] and [[] for the characters themselves"


def file_identity(path: str | Path) -> FileIdentity | None:
    """What tells whether two names are of one file; None where there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class UniqueFiles:
    """Refuses a file that is named a second time, whatever the second name is: another spelling, a link, a glob."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._names: dict[FileIdentity, str] = {}

    def add(self, entry: str, name: str | Path, path: str | Path) -> None:
        """Note that `entry` of a list names `name`, whose content is the file `path`.

        Raises:
            DataError: the file was named before.
        """
        identity = file_identity(path)
        if identity is None:
            return  # missing files are reported by whoever opens them
        before = self._names.get(identity)
        if before is not None:
            also = "" if before == str(name) else f" (as {before} before)"
            raise DataError(
                f"{entry}: names {name} a second time{also}: its {self._what} would be read twice; name it once"
            )
        self._names[identity] = str(name)


def first_text_file(entries: Iterable[str]) -> str | None:
    """The first entry that is a file of text rather than of tokens, judged by its name."""
    endings = tuple(suffix + packing for suffix in TEXT_SUFFIXES for packing in ("", *COMPRESSED_SUFFIXES))
    return next((entry for entry in entries if entry.endswith(endings) and Path(entry).is_file()), None)


def as_entries(spec: str | Sequence[str]) -> list[str]:
    """A list of entries, also where one stands alone."""
    return [spec] if isinstance(spec, str) else list(spec)


def _with_literal_folders(pattern: str) -> str:
    parts, known = Path(pattern).parts, 0
    while known < len(parts) - 1 and Path(*parts[: known + 1]).is_dir():
        known += 1
    return os.path.join(glob.escape(str(Path(*parts[:known]))), *parts[known:]) if known else pattern
