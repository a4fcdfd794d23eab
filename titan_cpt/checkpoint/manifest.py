"""manifest.json of a checkpoint: its files with sizes and checksums, its stage and step, and the training recipe.

The manifest is written last, by an atomic rename, after all files that it lists have been fsynced. A folder without a
manifest is not a checkpoint. Does not import torch: the report and the plan read manifests too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from titan_cpt.common.files import fsync, write_text_atomically
from titan_cpt.common.reading import is_there, read_text, readable
from titan_cpt.common.run_folder import MANIFEST_FILE, step_name
from titan_cpt.common.weights.named_weights import named_weights
from titan_cpt.errors import CheckpointError

FORMAT = 2  # format 1 had pickled files, or SHA-256 checksums
TRAINED_BY = "trained_by"
"""The entry of an import from another trainer: trainer, step, tokens, LR, and `optimizer` if it has a state of one."""
IMPORTED = "imported"
"""The `kind` of a checkpoint converted from a Hugging Face model, or from a checkpoint of another trainer."""
MERGED = "merged"
"""The `kind` of a checkpoint that `titan-cpt merge` wrote."""
_NAMES_SHOWN = 5
_CHECKPOINT_FILE = re.compile(
    r"rank-\d{5}-\d+\.safetensors|index\.json|\.?manifest\.json(\.[\d-]+)?(\.tmp)?"
    r"|__\d+_\d+\.distcp|\.metadata"  # format 1
    r"|\.nfs[0-9a-f]+"  # NFS renames a file that is removed while it is open
)
_KINDS: dict[str, type] = {
    "format": int,
    "stage": str,
    "stage_index": int,
    "steps_done": int,
    "run_step": int,
    "kind": str,
    "recipe": dict,
    "fingerprint": str,
    "data": dict,
    "files": dict,
}


def write(folder: Path, record: Mapping[str, Any], checksums: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write the manifest with all files of the folder. From then on the folder is a checkpoint.

    Args:
        record: the manifest's other keys; see _KINDS for those that are required.
        checksums: file name -> {"bytes", "xxh3_128"} of files that were hashed and fsynced while they were written;
            other files are fsynced and read here.

    Raises:
        CheckpointError: a file does not have the size that was written.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_FILE:
            name = path.relative_to(folder).as_posix()
            size = path.stat().st_size
            known = (checksums or {}).get(name)
            if known is None:
                fsync(path)
                known = {"bytes": size, "xxh3_128": content_checksum(path)}
            if known["bytes"] != size:
                raise CheckpointError(f"{path}: has {size} bytes, but {known['bytes']} were written")
            files[name] = dict(known)
    write_text_atomically(folder / MANIFEST_FILE, json.dumps({"format": FORMAT, **record, "files": files}, indent=1))
    fsync(folder.parent)


def link_checkpoint(checkpoint: Path, folder: Path, record: Mapping[str, Any]) -> None:
    """Make a second checkpoint with the same files under another manifest, by hard links where possible.

    The files of a checkpoint are never changed after it is saved, so sharing them is safe.

    Args:
        checkpoint: the existing checkpoint, already verified.
        folder: the new one.
        record: the new manifest, complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_room(folder)
    for name in record["files"]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(checkpoint / name, target)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(checkpoint / name, target)
            fsync(target)
    write_text_atomically(folder / MANIFEST_FILE, json.dumps(dict(record), indent=1))
    fsync(folder.parent)


def parse(text: str, path: Path | str) -> dict[str, Any]:
    """Read a manifest's text and check its keys and types.

    Args:
        text: the content of the file.
        path: its name, for messages.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    try:
        manifest: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    wrong = [
        key for key, kind in _KINDS.items() if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind)
    ]
    if wrong:
        raise CheckpointError(f"{path}: damaged: {', '.join(wrong)}: missing or of the wrong type")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: has format {manifest['format']!r}; this version reads format {FORMAT}")
    return manifest


def read(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and check its keys and types, but not the files that it lists.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
        AccessError: it exists, and the system refuses to read it.
    """
    path = folder / MANIFEST_FILE
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {_without_manifest(folder)}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    return parse(text, path)


def imported_optimizer(record: Mapping[str, Any]) -> str | None:
    """The optimizer whose state was imported from another trainer; None for every other checkpoint."""
    trained_by = record.get(TRAINED_BY)
    name = trained_by.get("optimizer") if isinstance(trained_by, Mapping) else None
    return name if isinstance(name, str) else None


def has_optimizer_state(record: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this manifest has an optimizer state: that of a stage, or of another trainer."""
    return record["kind"] not in (IMPORTED, MERGED) or imported_optimizer(record) is not None


def no_state_to_keep(record: Mapping[str, Any], *, of: str, stage: str) -> str:
    """Why a stage cannot keep the optimizer state of a checkpoint without one.

    Args:
        record: its manifest.
        of: the checkpoint, as messages name it.
        stage: name of the stage.
    """
    what = "an import" if record["kind"] == IMPORTED else "a merge"
    return f"{of}: is {what}, which has no optimizer state to keep: set stages.{stage}.optimizer_state to reset"


def is_in_place(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the folder's name is the one that the run saved it under: False if it was copied, renamed or moved."""
    return (folder.parent.name, folder.name) == (record["stage"], step_name(record["steps_done"]))


def _without_manifest(folder: Path) -> str:
    """Why a path is not a checkpoint; if it is a run or a stage, which checkpoints it holds."""
    if not is_there(folder):
        if (named := named_weights(folder)).average and is_there(named.folder / MANIFEST_FILE):
            return f"names an average, and a checkpoint with its optimizer state is needed here: name {named.folder}"
        return f"no such folder; a checkpoint is a folder with a {MANIFEST_FILE}"
    if folder.is_file():
        return f"is a file, not a checkpoint: a checkpoint is a folder with a {MANIFEST_FILE}"
    for kind, pattern in (("a stage of a run", "step-*"), ("a run", "*/step-*")):
        found = sorted(path.parent for path in folder.glob(f"{pattern}/{MANIFEST_FILE}"))
        if found:
            shown = ", ".join(str(path) for path in found[-3:])
            return f"is {kind}, not a checkpoint; its checkpoints are {'..., ' if found[3:] else ''}{shown}"
    why = f"has no {MANIFEST_FILE}, so it is not a checkpoint"
    if folder.name.startswith("step-"):
        return f"{why}: its save was interrupted; an earlier checkpoint beside it may be complete"
    if (folder / "config.json").is_file():
        return f"{why} but a Hugging Face model: `titan-cpt import` converts it to one"
    return why


def verify(folder: Path, *, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Compare every file with its size and checksum, and return the manifest.

    Args:
        share: 0-based index of the caller's share of the files: every `shares`-th file, starting with this one.
        shares: number of callers, such as ranks, that share the files.

    Raises:
        CheckpointError: names the first file that is missing, or whose size or checksum differs.
        AccessError: the system refuses to read one of the files.
    """
    manifest = read(folder)
    for name, file in list(manifest["files"].items())[share::shares]:
        path = folder / name
        if not isinstance(file, dict) or not _is_within(path, folder):
            raise CheckpointError(f"{folder / MANIFEST_FILE}: damaged: its entry {name!r} is not a file of this folder")
        try:
            _compare(path, file)
        except (FileNotFoundError, ValueError):
            raise CheckpointError(f"{path}: is missing; the manifest lists it with {file.get('bytes')} bytes") from None
    return manifest


def _compare(path: Path, file: Mapping[str, Any]) -> None:
    with readable(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a file")
        if status.st_size != file.get("bytes"):
            raise CheckpointError(f"{path}: has {status.st_size} bytes, the manifest says {file.get('bytes')}")
        if content_checksum(path) != file.get("xxh3_128"):
            raise CheckpointError(f"{path}: its content changed since it was saved (its checksum differs)")


def _is_within(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # a name that is not possible on this file system
        return False


def remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that a crash half-way leaves no folder that looks complete.

    Files that do not belong to the checkpoint, such as an export or notes that someone put there, are kept, and so is
    the folder.
    """
    listed = _listed_files(folder)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    if not folder.exists():
        return
    fsync(folder)
    foreign = _foreign(folder, listed)
    if not foreign:
        shutil.rmtree(folder)
        return
    for path in folder.rglob("*"):
        if path.is_file() and path not in foreign:
            path.unlink()


def make_room(folder: Path) -> None:
    """Remove an interrupted save or a damaged checkpoint, and create the folder anew, empty.

    Raises:
        OSError: the folder cannot be created, or it holds files that do not belong to a checkpoint, which are kept.
    """
    remove(folder)
    if folder.exists():
        foreign = sorted(path.relative_to(folder).as_posix() for path in _foreign(folder, set()))
        names = ", ".join(foreign[:_NAMES_SHOWN]) + ", ..." * (len(foreign) > _NAMES_SHOWN)
        reason = f"holds files that do not belong to a checkpoint ({names}); move them to another folder"
        raise FileExistsError(errno.EEXIST, reason, str(folder))
    folder.mkdir()


def _listed_files(folder: Path) -> set[Path]:
    """The files that the manifest lists; an empty set if it cannot be read."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        return {folder / name for name in files}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _foreign(folder: Path, listed: set[Path]) -> set[Path]:
    """Files that do not belong to the checkpoint: not listed in its manifest, nor named like files of a save."""
    files = {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return {path for path in files - listed if path.parent != folder or not _CHECKPOINT_FILE.fullmatch(path.name)}


def digest_of_files(record: Mapping[str, Any]) -> str:
    """SHA-256 over the manifest's list of files and checksums: equal for equal weights and optimizer state."""
    return hashlib.sha256(json.dumps(record["files"], sort_keys=True).encode()).hexdigest()


def content_checksum(path: Path) -> str:
    """The XXH3-128 checksum of a file, in hexadecimal digits, as manifests record it."""
    with path.open("rb") as file:
        digest = xxhash.xxh3_128()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
