"""The output files of `prepare`, and which existing files it may replace: only those that it provably wrote.

`prepare --output P` writes P.bin, P.idx and the record P.json, with --holdout also P-validation.bin/.idx, and keeps
unfinished parts in the folder P.partial. A pair was written by `prepare` if a record describes it: P.json, or the
record in P.partial of a run that was interrupted while it renamed its files.
"""

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titan_cpt.common.files import identity
from titan_cpt.data.formats.indexed_layout import DTYPES, pair_paths, read_header
from titan_cpt.data.formats.indexed_writer import dtype_code
from titan_cpt.data.prepare.provenance import VALIDATION_SUFFIX, read_record, record_path
from titan_cpt.errors import DataError

RECORD = "record.json"  # in the partial folder, written just before the output files are renamed
_DIGEST = r"[0-9a-f]{32}"
_PAIR = r"(-validation)?(\.\d+\.tmp)?\.(bin|idx)"
_OURS = re.compile(
    rf"lock|{RECORD}|\.{RECORD}\.[\d-]+\.tmp|\.?({_DIGEST}|joined){_PAIR}|{_DIGEST}(\.\d+)?\.json(\.tmp)?"
    r"|\.nfs[0-9a-f]+"  # NFS renames a file like this if it is removed while open
)
_NAMES_SHOWN = 5


def prefix_to_write(name: str) -> Path:
    """Return the prefix for a name: `data/german` for itself, data/german.bin and data/german.idx.

    Raises:
        DataError: the name is that of a folder.
    """
    prefix = name.removesuffix(".idx").removesuffix(".bin")
    if os.path.basename(prefix) in ("", ".", ".."):
        raise DataError(
            f"{name}: is a folder; the output is a file name without .bin and .idx, such as "
            f"{os.path.join(prefix, 'train')}"
        )
    return Path(prefix)


def validation_prefix(prefix: Path) -> Path:
    """Return the prefix of the validation data that is split off from an output."""
    return Path(f"{prefix}{VALIDATION_SUFFIX}")


def parts_folder(output: Path) -> Path:
    """Return the folder that holds the finished parts of an output until they are concatenated."""
    return Path(f"{output}.partial")


def refuse_inputs_in_the_way(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse inputs that are also files of the output, also through links, `..` or another letter case.

    Raises:
        DataError: an input would be overwritten; names both files.
    """
    paths = [*_files(output), *_files(validation_prefix(output))[:2]]
    with_partial = [*paths, *(parts_folder(output).iterdir() if parts_folder(output).is_dir() else ())]
    outputs = {identity(path): path for path in with_partial}
    outputs.pop(None, None)
    for source in inputs if outputs else ():
        target = outputs.get(identity(source))
        if target is not None:
            raise DataError(
                f"{source}: is an input and would be overwritten by the output file {target}: choose another output"
            )


def replaceable(output: Path, recipe: Mapping[str, Any], *, force: bool) -> list[Path]:
    """Return the files of an earlier run that the new one replaces, in the order in which to remove them.

    Args:
        output: the path without .bin and .idx.
        recipe: recipe of the new run, as its record will contain it.
        force: also replace files that were made with another recipe.

    Raises:
        DataError: an existing file was not provably written by `prepare`, or was made with another recipe and `force`
            is False.
    """
    _refuse_validation_prefix_of_another_output(output)
    interrupted = read_record(parts_folder(output) / RECORD)
    if interrupted is not None and recipe_of(interrupted) != recipe:
        interrupted = None
    record = read_record(record_path(output))
    records = [each for each in (record, interrupted) if each is not None]
    bin_path, idx, record_file = _files(output)
    pair = [path for path in (idx, bin_path) if _exists(path)]
    validation = _validation_files(output, needed=bool(recipe["holdout"]))
    own_pair = any(_is_pair(output, each["counts"]["tokens"], each) for each in records)
    own_validation = any(
        each["holdout"] and _is_pair(validation_prefix(output), each["counts"]["held_out_tokens"], each)
        for each in records
    ) and not read_record(record_path(validation_prefix(output)))
    foreign = [] if own_pair else pair
    foreign = foreign + (validation if recipe["holdout"] and not own_validation else [])
    foreign += [record_file] if _exists(record_file) and record is None else []
    if foreign:
        raise _foreign_files(foreign, record_file, has_record=record is not None)
    old = [*pair, *(validation if own_validation else [])]
    if old and record is not None and recipe_of(record) != recipe and interrupted is None and not force:
        difference = "; ".join(_differences(recipe_of(record), recipe))
        raise DataError(
            f"{old[0]}: exists, made differently: {difference}. Choose another output, or replace it with --force"
        )
    return old + ([record_file] if record is not None else [])


def _foreign_files(foreign: Sequence[Path], record_file: Path, *, has_record: bool) -> DataError:
    if has_record:
        why = f"{record_file} describes other content"
    elif record_file in foreign:
        why = f"{record_file} is not a record of it"
    else:
        why = f"there is no record {record_file}"
    exist, were = ("exists", "was") if len(foreign) == 1 else ("exist", "were")
    return DataError(
        f"{', '.join(map(str, foreign))}: {exist}, and {were} not written by `prepare` ({why}). Nothing was changed. "
        "Choose another output, or rename or remove these files; --force does not replace them"
    )


def recipe_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without its counts: everything that determines the output."""
    return {key: value for key, value in record.items() if key != "counts"}


def require_own_partial(output: Path) -> None:
    """Refuse a folder PREFIX.partial that contains anything except the parts of an interrupted run.

    Raises:
        DataError: names the other files.
    """
    folder = parts_folder(output)
    if not _exists(folder):
        return
    if not folder.is_dir():
        raise DataError(
            f"{folder}: is a file, but unfinished parts need a folder of that name: rename it, or choose another output"
        )
    foreign = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
    if foreign:
        shown = ", ".join(foreign[:_NAMES_SHOWN]) + ", ..." * (len(foreign) > _NAMES_SHOWN)
        raise DataError(
            f"{folder}: is needed for unfinished parts, but contains files that `prepare` did not write: {shown}. "
            "Rename it, or choose another output"
        )


def has_finished_parts(output: Path) -> bool:
    """Whether an interrupted run left finished parts to resume from."""
    return any(re.fullmatch(rf"{_DIGEST}\.json", path.name) for path in parts_folder(output).iterdir())


def remove_partial(output: Path) -> None:
    """Remove the parts, and the folder if it is then empty."""
    folder = parts_folder(output)
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "lock"):
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.EBUSY):
            raise


def _files(prefix: Path) -> tuple[Path, Path, Path]:
    """Return the .bin, the .idx and the record of a prefix."""
    return *pair_paths(prefix), record_path(prefix)


def _validation_files(output: Path, *, needed: bool) -> list[Path]:
    """Return the existing files of PREFIX-validation, the .idx first."""
    try:
        return [path for path in pair_paths(validation_prefix(output))[::-1] if _exists(path)]
    except OSError:  # such as a name that is too long; without --holdout that file is not written
        if needed:
            raise
        return []


def _refuse_validation_prefix_of_another_output(output: Path) -> None:
    if not output.name.endswith(VALIDATION_SUFFIX) or output.name == VALIDATION_SUFFIX:
        return
    base = Path(str(output).removesuffix(VALIDATION_SUFFIX))
    record = read_record(record_path(base))
    if record is not None and record["holdout"]:
        raise DataError(
            f"{output}: contains the validation data of {base} (see {record_path(base)}): choose another output"
        )


def _exists(path: Path) -> bool:
    """Whether a file or a dangling link exists; raises any other error, such as for a name that is too long."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _is_pair(prefix: Path, tokens: int, record: Mapping[str, Any]) -> bool:
    """Whether a pair, or its remaining file, has the number of tokens in a record."""
    bin_path, idx = pair_paths(prefix)
    try:
        if idx.is_file() and _tokens_of_index(idx) == tokens:
            return True
    except DataError:
        pass  # damaged: the .bin decides
    expected_bytes = tokens * DTYPES[dtype_code(record["tokenizer"]["vocab_size"])].itemsize
    return bin_path.is_file() and bin_path.stat().st_size == expected_bytes


def _tokens_of_index(idx: Path) -> int:
    """Number of tokens from the last pointer and the last size of an index."""
    header = read_header(idx)
    if not header.sequences:
        return 0
    with open(idx, "rb") as file:
        file.seek(header.sizes_at(header.sequences - 1))
        size = int(np.frombuffer(file.read(4), "<i4")[0])
        file.seek(header.pointer_at(header.sequences - 1))
        return int(np.frombuffer(file.read(8), "<i8")[0]) // header.dtype.itemsize + size


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield `key old -> new` for each key that differs; for the inputs, the first that differs."""
    for key in dict.fromkeys((*new, *old)):
        if old.get(key) == new.get(key):
            continue
        if key != "inputs":
            yield f"{key} {old.get(key, False)} -> {new.get(key, False)}"  # add_bos is only recorded if true
        elif len(old["inputs"]) != len(new["inputs"]):
            yield f"{len(old['inputs'])} inputs -> {len(new['inputs'])}"
        else:
            pairs = zip(old["inputs"], new["inputs"], strict=True)
            yield next(f"input {before} -> {now}" for before, now in pairs if before != now)
