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
from titan_cpt.errors import DataError

HUB = "hub:"
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar", ".lz4")


class Split(NamedTuple):
    """What a name stands for."""

    format: str
    """The module of `datasets` that reads it: json, parquet, csv, text, ..."""
    files: tuple[str, ...]
    """Paths or addresses (hf://, https://), in order."""
    field: str | None
    """JSON only: the field of a file's one object that holds the list of records."""


def name_parts(spec: str) -> tuple[str, str | None, str]:
    """Name, config if any, and split of hub:NAME[:CONFIG[:SPLIT]].

    Raises:
        DataError: the name has no such form.
    """
    name, config, split, *rest = [*spec.removeprefix(HUB).split(":"), "", ""]
    if not name or any(rest):
        raise DataError(f"{spec}: allowed is {HUB}NAME[:CONFIG[:SPLIT]]")
    return name, config or None, split or "train"


def version_of(spec: str) -> str:
    """A hash that changes with the data's revision or files.

    Raises:
        DataError: the library cannot open it.
    """
    return str(_builder(spec).hash)


def open_split(spec: str) -> Split:
    """Find the files of a split.

    Raises:
        DataError: the library cannot open it, there is no such split, or its JSON is of a kind that is not read here.
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
        raise DataError(f"{spec}: {archive} is an archive; download and unpack it, and name its files as the input")
    if found.format == "json" and (getattr(builder.config, "encoding", None) or "utf-8").lower() not in (
        "utf-8",
        "utf8",
    ):
        raise DataError(f"{spec}: is in {builder.config.encoding}; download it and convert it to UTF-8")
    return found


def open_file(name: str) -> IO[bytes]:
    """Open a file of a split as it is stored, still packed."""
    if "://" not in name:
        return open(name, "rb")
    import fsspec  # comes with datasets

    opened: IO[bytes] = fsspec.open(name, "rb").open()
    return opened


def values(spec: str, split: Split, text_field: str) -> Iterator[Any]:
    """The rows of a split in any other format (CSV, text, Arrow, ...), streamed through the library.

    Raises:
        DataError: the library cannot read it, or a packed file is cut short.
    """
    import datasets  # takes seconds to import, and most inputs are files

    name, config, part = name_parts(spec)
    for file in split.files:
        _check_packed(file)
    # Without these, pandas reads a piece of numbers as numbers (007 becomes 7) and NA, null, None as nothing.
    options = {"keep_default_na": False, "converters": {text_field: str}} if split.format == "csv" else {}
    try:
        yield from datasets.load_dataset(name, config, split=part, streaming=True, **options)
    except DataError:
        raise
    except Exception as fault:  # the library passes on whatever its network and file layers raise
        raise DataError(f"{spec}: the `datasets` library cannot read it: {fault}") from fault


def _check_packed(name: str) -> None:
    """Refuse a file that ends too early: the library takes a .zst that does for a whole one, and an empty .gz too."""
    if not name.endswith(COMPRESSED_SUFFIXES):
        return
    try:
        with open_file(name) as file:
            for _ in decompressed_blocks(file, name):
                if not name.endswith(".zst"):
                    return
    except OSError as fault:
        raise DataError(f"{name}: cannot be read: {fault.strerror or fault}") from fault


def _builder(spec: str) -> Any:
    name, config, _ = name_parts(spec)
    hint = _not_here(spec, name)
    import datasets

    try:
        return datasets.load_dataset_builder(name, config)
    except Exception as fault:  # as above
        raise DataError(f"{spec}: the `datasets` library cannot open it: {fault}{hint and '. '}{hint}") from fault


@cache
def _not_here(spec: str, name: str) -> str:
    """ "" for a folder of this machine; of another name, printed before the network is asked, what it may have meant.

    Raises:
        DataError: it is a file, or a path that cannot be a name of the Hugging Face hub.
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
    print(f"note: {spec}: looked up on the Hugging Face hub. {hint}", file=sys.stderr, flush=True)
    return hint


def file_name(name: str) -> str:
    """The last part of a path or an address, for its suffix."""
    return Path(name.partition("?")[0]).name
