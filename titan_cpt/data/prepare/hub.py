"""Hugging Face datasets (`hub:NAME`): the files of a split, and rows of the formats that chunks.py does not read.

chunks.py reads JSON and parquet files itself, from the addresses that `datasets` finds. The JSON reader of `datasets`
(5.2) infers a type per block of a file and changes texts silently: if one text of a block is a number, every string of
the block comes back with its quotation marks; if all of them look like dates, they come back as timestamps.
"""

import difflib
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from titan_cpt.data.prepare.decompress import COMPRESSED_SUFFIXES, decompressed_blocks
from titan_cpt.errors import DataError, reason_and_remedy

HUB = "hub:"
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar", ".lz4")


class Split(NamedTuple):
    """A split of a Hugging Face dataset."""

    format: str
    """The `datasets` module that reads it: json, parquet, csv, text, ..."""
    files: tuple[str, ...]
    """Paths or URLs (hf://, https://), in order."""
    field: str | None
    """JSON only: the field with the list of records, if a file is one object."""


def name_parts(spec: str) -> tuple[str, str | None, str]:
    """Return name, config (or None) and split of hub:NAME[:CONFIG[:SPLIT]].

    Raises:
        DataError: the name has another form.
    """
    name, config, split, *rest = [*spec.removeprefix(HUB).split(":"), "", ""]
    if not name or any(rest):
        raise DataError(f"{spec}: allowed is {HUB}NAME[:CONFIG[:SPLIT]]")
    return name, config or None, split or "train"


def version_of(spec: str) -> str:
    """Return a hash that changes with the revision or the files of the dataset.

    Raises:
        DataError: the library cannot open it.
    """
    return str(_builder(spec).hash)


def open_split(spec: str) -> Split:
    """Return the files of a split.

    Raises:
        DataError: the library cannot open it, it has no such split, or its JSON is archived or not UTF-8.
    """
    builder = _builder(spec)
    split = name_parts(spec)[2]
    files = builder.config.data_files or {}
    if split not in files:
        known = ", ".join(map(str, files)) or "none"
        raise DataError(f"{spec}: has no split {split!r}; its splits are {known}")
    found = Split(
        type(builder).__module__.rpartition(".")[2],
        tuple(map(str, files[split])),
        getattr(builder.config, "field", None),
    )
    archive = next((file for file in found.files if file.endswith(ARCHIVES)), None)
    if found.format == "json" and archive:
        raise DataError(f"{spec}: {archive} is an archive; download and extract it, and name its files as the input")
    if found.format == "json" and (getattr(builder.config, "encoding", None) or "utf-8").lower() not in (
        "utf-8",
        "utf8",
    ):
        raise DataError(f"{spec}: is in {builder.config.encoding}; download it and convert it to UTF-8")
    return found


def open_file(name: str) -> IO[bytes]:
    """Open a file of a split without decompressing it."""
    if "://" not in name:
        return open(name, "rb")
    import fsspec  # comes with datasets

    opened: IO[bytes] = fsspec.open(name, "rb").open()
    return opened


def stream_rows(spec: str, split: Split, text_field: str) -> Iterator[Any]:
    """Yield the rows of a split in another format (CSV, text, Arrow, ...), streamed by `datasets`.

    Raises:
        DataError: the library cannot read it, or a compressed file is incomplete.
    """
    import datasets  # takes seconds to import, and most inputs are files

    name, config, part = name_parts(spec)
    for file in split.files:
        _check_compressed(file)
    # By default pandas would parse numbers (007 becomes 7) and read NA, null and None as missing values.
    options = {"keep_default_na": False, "converters": {text_field: str}} if split.format == "csv" else {}
    try:
        yield from datasets.load_dataset(name, config, split=part, streaming=True, **options)
    except DataError:
        raise
    except Exception as fault:  # the library does not wrap the errors of its network and file layers
        raise DataError(f"{spec}: the `datasets` library cannot read it: {fault}") from fault


def _check_compressed(name: str) -> None:
    """Raise DataError for an incomplete file: the library accepts a truncated .zst and an empty .gz."""
    if not name.endswith(COMPRESSED_SUFFIXES):
        return
    try:
        with open_file(name) as file:
            for _ in decompressed_blocks(file, name):
                if not name.endswith(".zst"):
                    return
    except OSError as fault:
        raise DataError(f"{name}: cannot be read: {reason_and_remedy(fault)}") from fault


def _builder(spec: str) -> Any:
    name, config, _ = name_parts(spec)
    hint = _local_folder_hint(spec, name)
    import datasets

    try:
        return datasets.load_dataset_builder(name, config)
    except Exception as fault:  # as above
        raise DataError(f"{spec}: the `datasets` library cannot open it: {fault}{hint and '. '}{hint}") from fault


@cache
def _local_folder_hint(spec: str, name: str) -> str:
    """Say which local folder a name may mean, and print that before `datasets` contacts the hub; "" for a local folder.

    Raises:
        DataError: the name is a local file, or a path that cannot be a name on the Hugging Face hub.
    """
    if os.path.isdir(name):
        return ""
    if os.path.isfile(name):
        raise DataError(f"{spec}: is a file on this machine: name it without {HUB!r}, or name its folder")
    folder, last = os.path.split(name)
    try:
        siblings = os.listdir(folder or ".")
    except OSError:
        siblings = []
    near = [os.path.join(folder, found) for found in difflib.get_close_matches(last, siblings)]
    hint = f"There is no folder {name!r} on this machine" + (f", but {', '.join(map(repr, near))}" if near else "")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"{spec}: {hint[0].lower()}{hint[1:]}")
    print(f"note: {spec}: looking it up on the Hugging Face hub. {hint}", file=sys.stderr, flush=True)
    return hint


def base_name(name: str) -> str:
    """Return the last component of a path or URL."""
    return Path(name.partition("?")[0]).name
