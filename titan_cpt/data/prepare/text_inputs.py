"""The inputs of `prepare`: from file names, globs and `hub:` names to a list of TextInput. chunks.py reads them.

    .txt                        one document per file
    .jsonl  .json               one JSON object per line, or in a .json one array of objects; one field holds the text
    .parquet                    one document per row; one column holds the text
    hub:NAME[:CONFIG[:SPLIT]]   a Hugging Face dataset, streamed (hub.py); SPLIT is train unless given

.txt, .jsonl and .json may be compressed as .gz, .zst, .bz2 or .xz.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_cpt.common.readable import memory
from titan_cpt.data.file_names import UniqueFiles, expand_glob, glob_escape_hint
from titan_cpt.data.prepare import hub
from titan_cpt.data.prepare.decompress import COMPRESSED_SUFFIXES
from titan_cpt.data.prepare.hub import HUB
from titan_cpt.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".json")
ALLOWED = f"{', '.join(SUFFIXES)} (also {', '.join(COMPRESSED_SUFFIXES)}), .parquet, {HUB}NAME[:CONFIG[:SPLIT]]"


@dataclass(frozen=True)
class TextInput:
    """One input: a file, or a Hugging Face dataset."""

    spec: str

    @property
    def is_hub(self) -> bool:
        """Whether it is a Hugging Face dataset (`hub:NAME`)."""
        return self.spec.startswith(HUB)

    @property
    def disk_bytes(self) -> int:
        """Length of the file on disk, compressed or not; 0 for a Hugging Face dataset."""
        return 0 if self.is_hub else Path(self.spec).stat().st_size

    def identity(self) -> dict[str, Any]:
        """Fields that change when the input changes: name, length and modification time, or the dataset's hash."""
        if self.is_hub:
            return {"name": self.spec, "hash": hub.version_of(self.spec)}
        status = Path(self.spec).stat()
        return {"name": Path(self.spec).name, "bytes": status.st_size, "changed_ns": status.st_mtime_ns}


def find_inputs(inputs: Sequence[str]) -> list[TextInput]:
    """Return the inputs that file names, globs (sorted) and hub names refer to, in the order given.

    Raises:
        DataError: a name matches nothing or has an unsupported suffix, or a file is named twice.
    """
    found: list[TextInput] = []
    hubs: set[str] = set()
    once = UniqueFiles("text")
    for entry in inputs:
        names = [entry] if entry.startswith(HUB) else _match(entry)
        if not names and Path(entry).is_dir():
            raise DataError(f"{entry}: is a folder: {_suggest_globs(entry)}")
        if not names:
            why = f"no such file, and no file matches it as a glob; allowed are {ALLOWED}"
            raise DataError(f"{entry}: {why}{glob_escape_hint(entry)}")
        for name in names:
            if not name.startswith(HUB) and file_kind(name) is None:
                raise DataError(f"{name}: unsupported file type; allowed are {ALLOWED}")
            if name in hubs:
                raise DataError(f"{entry}: names {name} a second time: its text would be read twice; name it once")
            if name.startswith(HUB):
                hubs.add(name)
            else:
                once.add(entry, name, name)
            found.append(TextInput(name))
    if not found:
        raise DataError(f"no input was given; allowed are {ALLOWED}")
    return found


def inputs_text(inputs: Sequence[str]) -> str:
    """Number and size of the inputs, for a person.

    Raises:
        DataError: as `find_inputs`.
    """
    found = find_inputs(inputs)
    files = [source for source in found if not source.is_hub]
    size = memory(sum(source.disk_bytes for source in files) / 2**30)
    parts = [f"{len(files)} {'file' if len(files) == 1 else 'files'} ({size})"] if files else []
    return ", ".join([*parts, *(source.spec for source in found if source.is_hub)])


def missing_inputs(inputs: Sequence[str]) -> list[str]:
    """Return the names and globs that match no file; a Hugging Face dataset is never missing."""
    return [entry for entry in inputs if not entry.startswith(HUB) and not _match(entry)]


def _match(entry: str) -> list[str]:
    if os.path.isfile(entry):
        return [entry]
    return [name for name in expand_glob(entry) if os.path.isfile(name)]


def _suggest_globs(folder: str) -> str:
    """Suggest globs for the supported files in a folder, at its top or one level down."""
    folder = folder.rstrip("/")
    readable = [*(kind + packing for kind in SUFFIXES for packing in ("", *COMPRESSED_SUFFIXES)), ".parquet"]
    for below in ("*", "*/*"):
        names = [path.name for path in Path(folder).glob(below) if path.is_file()]
        patterns = [below + suffix for suffix in readable if any(name.endswith(suffix) for name in names)]
        if patterns:
            return f"name its files, such as {' '.join(repr(f'{glob.escape(folder)}/{each}') for each in patterns)}"
    return f"name files, not folders; it contains no supported file; allowed are {ALLOWED}"


def file_kind(name: str) -> str | None:
    """Return the suffix of the format, without the compression suffix; None for an unknown format."""
    if name.startswith(HUB):
        return HUB
    if name.endswith(".parquet"):
        return ".parquet"
    return next(
        (kind for kind in SUFFIXES for packing in ("", *COMPRESSED_SUFFIXES) if name.endswith(kind + packing)), None
    )
