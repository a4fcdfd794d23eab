"""What a preparation may replace: files that its records prove to be the package's own, and nothing else.

`prepare --output P` owns P.bin, P.idx, P.json (the record), with a hold-out P-validation.bin/.idx, and while it works
the folder P.partial. A pair is ours if a record names it: P.json, or the record that an interrupted attempt left in
P.partial when it had begun to put its files in place.
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

RECORD = "record.json"  # of an attempt, in its partial folder, from the moment at which it puts its files in place
_DIGEST = r"[0-9a-f]{32}"
_PAIR = r"(-validation)?(\.\d+\.tmp)?\.(bin|idx)"
_OURS = re.compile(
    rf"lock|{RECORD}|\.{RECORD}\.[\d-]+\.tmp|\.?({_DIGEST}|joined){_PAIR}|{_DIGEST}(\.\d+)?\.json(\.tmp)?"
    r"|\.nfs[0-9a-f]+"  # what NFS makes of a file that is removed while it is open
)
_NAMES_SHOWN = 5


def prefix_to_write(name: str) -> Path:
    """The prefix that a name means: `data/german`, which data/german.bin and data/german.idx mean too.

    Raises:
        DataError: the name is that of a folder.
    """
    prefix = name.removesuffix(".idx").removesuffix(".bin")
    if os.path.basename(prefix) in ("", ".", ".."):
        raise DataError(
            f"{name}: names a folder, and the name of a file without .bin and .idx is needed, such as "
            f"{os.path.join(prefix, 'train')}"
        )
    return Path(prefix)


def validation_prefix(prefix: Path) -> Path:
    """Where the held-out documents of an output are stored."""
    return Path(f"{prefix}{VALIDATION_SUFFIX}")


def partial_folder(output: Path) -> Path:
    """Where the finished parts of an output are kept until they are joined."""
    return Path(f"{output}.partial")


def refuse_inputs_in_the_way(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse inputs that are files of the output, whatever their spelling: links, `..` and letter case are resolved.

    Raises:
        DataError: names the input and the file of the output.
    """
    paths = [*_files(output), *_files(validation_prefix(output))[:2]]
    with_partial = [*paths, *(partial_folder(output).iterdir() if partial_folder(output).is_dir() else ())]
    places = {identity(path): path for path in with_partial}
    places.pop(None, None)
    for source in inputs if places else ():
        place = places.get(identity(source))
        if place is not None:
            raise DataError(
                f"{source}: is an input, and at the same time the output's file {place}: choose another output, "
                "whose files would not replace it"
            )


def replaceable(output: Path, recipe: Mapping[str, Any], *, force: bool) -> list[Path]:
    """The files of an earlier preparation that the new one replaces, in the order in which they are to be removed.

    Args:
        output: the path without .bin and .idx.
        recipe: of the new preparation, as its record will hold it.
        force: also those of another recipe.

    Raises:
        DataError: a file in the way is not proven to be ours, or was made by another recipe and `force` is off.
    """
    _refuse_the_held_out_part_of_another(output)
    attempt = read_record(partial_folder(output) / RECORD)
    if attempt is not None and recipe_of(attempt) != recipe:
        attempt = None
    record = read_record(record_path(output))
    records = [each for each in (record, attempt) if each is not None]
    bin_path, idx, record_file = _files(output)
    pair = [path for path in (idx, bin_path) if _exists(path)]
    held_out = _held_out_files(output, needed=bool(recipe["holdout"]))
    own_pair = any(_is_pair(output, each["counts"]["tokens"], each) for each in records)
    own_held_out = any(
        each["holdout"] and _is_pair(validation_prefix(output), each["counts"]["held_out_tokens"], each)
        for each in records
    ) and not read_record(record_path(validation_prefix(output)))
    foreign = [] if own_pair else pair
    foreign = foreign + (held_out if recipe["holdout"] and not own_held_out else [])
    foreign += [record_file] if _exists(record_file) and record is None else []
    if foreign:
        why = f"no {record_file} says so" if record is None else f"{record_file} describes other content"
        raise DataError(
            f"{', '.join(map(str, foreign))}: {'exists' if len(foreign) == 1 else 'exist'} and "
            f"{'was' if len(foreign) == 1 else 'were'} not made by this preparation ({why}). Nothing was changed. "
            "Choose another output, or rename or remove what is in the way; --force does not replace it"
        )
    old = [*pair, *(held_out if own_held_out else [])]
    if old and record is not None and recipe_of(record) != recipe and attempt is None and not force:
        difference = "; ".join(_differences(recipe_of(record), recipe))
        raise DataError(
            f"{old[0]}: exists, made in another way: {difference}. Choose another output, or replace it with --force"
        )
    return old + ([record_file] if record is not None else [])


def recipe_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what was counted: all that the output depends on."""
    return {key: value for key, value in record.items() if key != "counts"}


def require_own_partial(output: Path) -> None:
    """Refuse a folder PREFIX.partial that holds anything but the parts that an interrupted preparation leaves.

    Raises:
        DataError: names what else it holds.
    """
    folder = partial_folder(output)
    if not _exists(folder):
        return
    if not folder.is_dir():
        raise DataError(f"{folder}: is a file; its name is needed for a folder: rename it, or choose another output")
    foreign = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
    if foreign:
        shown = ", ".join(foreign[:_NAMES_SHOWN]) + ", ..." * (len(foreign) > _NAMES_SHOWN)
        raise DataError(
            f"{folder}: is where unfinished parts are kept and removed at the end, and it holds files that are not "
            f"ours: {shown}. Rename it, or choose another output"
        )


def has_finished_parts(output: Path) -> bool:
    """Whether an interrupted preparation can resume from what it left."""
    return any(re.fullmatch(rf"{_DIGEST}\.json", path.name) for path in partial_folder(output).iterdir())


def remove_partial(output: Path) -> None:
    """Remove our parts, and the folder if nothing else is in it."""
    folder = partial_folder(output)
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
    """A prefix's .bin, .idx and record."""
    return *pair_paths(prefix), record_path(prefix)


def _held_out_files(output: Path, *, needed: bool) -> list[Path]:
    """The files of PREFIX-validation that exist, the .idx first."""
    try:
        return [path for path in pair_paths(validation_prefix(output))[::-1] if _exists(path)]
    except OSError:  # such as a name that is too long, of a file that is not going to be written
        if needed:
            raise
        return []


def _refuse_the_held_out_part_of_another(output: Path) -> None:
    if not output.name.endswith(VALIDATION_SUFFIX) or output.name == VALIDATION_SUFFIX:
        return
    whole = Path(str(output).removesuffix(VALIDATION_SUFFIX))
    record = read_record(record_path(whole))
    if record is not None and record["holdout"]:
        raise DataError(
            f"{output}: is where {whole} keeps its held-out documents ({record_path(whole)} says so): choose another "
            "output"
        )


def _exists(path: Path) -> bool:
    """Also a symbolic link that leads nowhere; other faults than a missing file are raised, such as a name too long."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _is_pair(prefix: Path, tokens: int, record: Mapping[str, Any]) -> bool:
    """Whether a pair, or what is left of it, has as many tokens as a record says."""
    bin_path, idx = pair_paths(prefix)
    try:
        if idx.is_file() and _tokens_of_index(idx) == tokens:
            return True
    except DataError:
        pass  # damaged: the .bin decides
    expected_bytes = tokens * DTYPES[dtype_code(record["tokenizer"]["vocab_size"])].itemsize
    return bin_path.is_file() and bin_path.stat().st_size == expected_bytes


def _tokens_of_index(idx: Path) -> int:
    """Tokens by the last pointer and the last size of an index."""
    header = read_header(idx)
    if not header.sequences:
        return 0
    with open(idx, "rb") as file:
        file.seek(header.sizes_at(header.sequences - 1))
        size = int(np.frombuffer(file.read(4), "<i4")[0])
        file.seek(header.pointer_at(header.sequences - 1))
        return int(np.frombuffer(file.read(8), "<i8")[0]) // header.dtype.itemsize + size


def _differences(was: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Each key that differs, as found and as wanted; of the inputs the first that does."""
    for key in dict.fromkeys((*wanted, *was)):
        if was.get(key) == wanted.get(key):
            continue
        if key != "inputs":
            yield f"{key} {was.get(key, False)} -> {wanted.get(key, False)}"  # add_bos is only stored where it is true
        elif len(was["inputs"]) != len(wanted["inputs"]):
            yield f"{len(was['inputs'])} inputs -> {len(wanted['inputs'])}"
        else:
            pairs = zip(was["inputs"], wanted["inputs"], strict=True)
            yield next(f"input {before} -> {now}" for before, now in pairs if before != now)
